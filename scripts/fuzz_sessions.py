"""Session files that were tampered with, given to a running server: each must be refused, and the server must live.

    memtx serve --checkpoint RUN --port 8000 &
    python scripts/fuzz_sessions.py http://127.0.0.1:8000 [--count 1000] [--seed 0]

A session is exported, cut short, changed by a bit or a byte, joined with another's halves, or said to be another
model's; and names that are paths are asked for. Printed: how many of each kind were refused with a clear error.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from urllib.parse import quote

from asking import Connection, address

NAMES = (
    "../../etc/passwd", "..", "/etc/passwd", "a" * 32, "A" * 32, "\0" * 32, "." * 32, "con", "%2e%2e%2f", "~",
    "\u202e" * 8, "0" * 31 + "\n", "0" * 5000, "..\\..\\windows", "file:///etc/passwd", ".lock",
)  # fmt: skip


def cut(content: bytes, drawn: random.Random) -> bytes:
    """Cut short."""
    return content[: drawn.randrange(len(content))]


def flip(content: bytes, drawn: random.Random) -> bytes:
    """Change one bit, every other time in the header."""
    changed = bytearray(content)
    place = drawn.randrange(min(2000, len(content)) if drawn.random() < 0.5 else len(content))
    changed[place] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def fill(content: bytes, drawn: random.Random) -> bytes:
    """Write noise over a stretch."""
    start = drawn.randrange(len(content))
    noise = drawn.randbytes(min(drawn.randrange(1, 200), len(content) - start))
    changed = content[:start] + noise + content[start + len(noise) :]
    return changed if changed != content else cut(content, drawn)


def grow(content: bytes, drawn: random.Random) -> bytes:
    """Add bytes behind the end."""
    return content + drawn.randbytes(drawn.randrange(1, 100))


def foreign(content: bytes, drawn: random.Random) -> bytes:
    """Say that it is another model's: its digest of 64 digits becomes another."""
    place = content.index(b'"model":"') + 9
    return content[:place] + bytes(drawn.choice(b"0123456789abcdef") for _ in range(64)) + content[place + 64 :]


def pickled(content: bytes, drawn: random.Random) -> bytes:
    """Give a pickle that would run a program."""
    return b"cos\nsystem\n(S'touch executed'\ntR." + drawn.randbytes(8)


KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, fill, grow, foreign, pickled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", type=address, help="of a server on this machine")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ask = Connection(arguments.address).ask
    text = json.dumps({"text": "It was a dark and stormy night. " * 100}).encode()
    name = json.loads(ask("POST", "/v1/sessions", text)[1])["id"]
    content = ask("GET", f"/v1/sessions/{name}/export")[1]
    drawn, refused, wrong = random.Random(arguments.seed), Counter[str](), []
    for number in range(arguments.count):
        kind = KINDS[number % len(KINDS)]
        status, said = ask("POST", "/v1/sessions/import", kind(content, drawn))
        clear = status == 400 and json.loads(said)["error"]["what"] and b"Traceback" not in said
        refused[kind.__name__] += bool(clear)
        if not clear:
            wrong.append(f"{kind.__name__} {number}: {status} {said[:200]!r}")
    for trick in NAMES:
        for method, end in (("GET", ""), ("GET", "/export"), ("DELETE", ""), ("POST", "/save")):
            status, said = ask(method, f"/v1/sessions/{quote(trick, safe='')}{end}")
            refused["names"] += status in (404, 405)
            if status not in (404, 405):
                wrong.append(f"{method} {trick!r}{end}: {status} {said[:200]!r}")
    alive = ask("GET", f"/v1/sessions/{name}")[0] == 200 and ask("DELETE", f"/v1/sessions/{name}")[0] == 204
    print(json.dumps({"refused": dict(refused), "wrong": len(wrong), "alive": alive}))
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    return 0 if alive and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
