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

from asking import Connection, local_url

INVALID_NAMES = (
    "../../etc/passwd", "..", "/etc/passwd", "a" * 32, "A" * 32, "\0" * 32, "." * 32, "con", "%2e%2e%2f", "~",
    "\u202e" * 8, "0" * 31 + "\n", "0" * 5000, "..\\..\\windows", "file:///etc/passwd", ".lock",
)  # fmt: skip


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Cut short."""
    return content[: rng.randrange(len(content))]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    """Change one bit, every other time in the header."""
    changed = bytearray(content)
    place = rng.randrange(min(2000, len(content)) if rng.random() < 0.5 else len(content))
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_with_noise(content: bytes, rng: random.Random) -> bytes:
    """Write noise over a stretch."""
    start = rng.randrange(len(content))
    noise = rng.randbytes(min(rng.randrange(1, 200), len(content) - start))
    changed = content[:start] + noise + content[start + len(noise) :]
    return changed if changed != content else truncate(content, rng)


def append_bytes(content: bytes, rng: random.Random) -> bytes:
    """Add bytes behind the end."""
    return content + rng.randbytes(rng.randrange(1, 100))


def change_model(content: bytes, rng: random.Random) -> bytes:
    """Say that it is another model's: its digest of 64 digits becomes another."""
    place = content.index(b'"model":"') + 9
    return content[:place] + bytes(rng.choice(b"0123456789abcdef") for _ in range(64)) + content[place + 64 :]


def inject_pickle(content: bytes, rng: random.Random) -> bytes:
    """Give a pickle that would run a program."""
    return b"cos\nsystem\n(S'touch executed'\ntR." + rng.randbytes(8)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate,
    flip_bit,
    overwrite_with_noise,
    append_bytes,
    change_model,
    inject_pickle,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", type=local_url, help="of a server on this machine")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ask = Connection(arguments.url).request
    text = json.dumps({"text": "It was a dark and stormy night. " * 100}).encode()
    name = json.loads(ask("POST", "/v1/sessions", text)[1])["id"]
    content = ask("GET", f"/v1/sessions/{name}/export")[1]
    drawn, refused, wrong = random.Random(arguments.seed), Counter[str](), []
    for number in range(arguments.count):
        kind = MUTATIONS[number % len(MUTATIONS)]
        status, said = ask("POST", "/v1/sessions/import", kind(content, drawn))
        clear = status == 400 and json.loads(said)["error"]["detail"] and b"Traceback" not in said
        refused[kind.__name__] += bool(clear)
        if not clear:
            wrong.append(f"{kind.__name__} {number}: {status} {said[:200]!r}")
    for trick in INVALID_NAMES:
        for method, end in (("GET", ""), ("GET", "/export"), ("DELETE", ""), ("POST", "/save")):
            status, said = ask(method, f"/v1/sessions/{quote(trick, safe='')}{end}")
            refused["names"] += status in (404, 405)
            if status not in (404, 405):
                wrong.append(f"{method} {trick!r}{end}: {status} {said[:200]!r}")
    alive = ask("GET", f"/v1/sessions/{name}")[0] == 200 and ask("DELETE", f"/v1/sessions/{name}")[0] == 204
    print(json.dumps({"refused": dict(refused), "failures": len(wrong), "alive": alive}))
    for one in wrong[:10]:
        print(one, file=sys.stderr)
    return 0 if alive and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
