"""Send corrupted session files to a running server: it must refuse all of them and stay alive.

    memtx serve --checkpoint RUN --port 8000 &
    python scripts/fuzz_sessions.py http://127.0.0.1:8000 [--count 1000] [--seed 0]

An exported session is truncated, changed by a bit or by noise, extended, assigned to another model, or replaced by a
pickle; session ids that are paths are requested too. Prints the number of each kind refused with a clear error.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from urllib.parse import quote

import corruption
from http_client import Connection, local_url

INVALID_NAMES = (
    "../../etc/passwd", "..", "/etc/passwd", "a" * 32, "A" * 32, "\0" * 32, "." * 32, "con", "%2e%2e%2f", "~",
    "\u202e" * 8, "0" * 31 + "\n", "0" * 5000, "..\\..\\windows", "file:///etc/passwd", ".lock",
)  # fmt: skip


def change_model(content: bytes, rng: random.Random) -> bytes:
    """Name another model: a random fingerprint of 64 digits."""
    start = content.index(b'"model":"') + 9
    return content[:start] + bytes(rng.choice(b"0123456789abcdef") for _ in range(64)) + content[start + 64 :]


def inject_pickle(content: bytes, rng: random.Random) -> bytes:
    """Replace the session by a pickle that would run a program."""
    return b"cos\nsystem\n(S'touch executed'\ntR." + rng.randbytes(8)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    corruption.truncate, corruption.flip_bit, corruption.overwrite_with_noise, corruption.append_bytes, change_model,
    inject_pickle,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", type=local_url, help="address of a server on this machine")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    request = Connection(arguments.url).request
    text = json.dumps({"text": "It was a dark and stormy night. " * 100}).encode()
    session_id = json.loads(request("POST", "/v1/sessions", text)[1])["id"]
    content = request("GET", f"/v1/sessions/{session_id}/export")[1]
    rng, refused, failures = random.Random(arguments.seed), Counter[str](), []
    for index in range(arguments.count):
        mutation = MUTATIONS[index % len(MUTATIONS)]
        while (mutated := mutation(content, rng)) == content:
            pass
        status, body = request("POST", "/v1/sessions/import", mutated)
        is_refused = status == 400 and json.loads(body)["error"]["detail"] and b"Traceback" not in body
        refused[mutation.__name__] += bool(is_refused)
        if not is_refused:
            failures.append(f"{mutation.__name__} {index}: {status} {body[:200]!r}")
    for name in INVALID_NAMES:
        for method, suffix in (("GET", ""), ("GET", "/export"), ("DELETE", ""), ("POST", "/save")):
            status, body = request(method, f"/v1/sessions/{quote(name, safe='')}{suffix}")
            refused["names"] += status in (404, 405)
            if status not in (404, 405):
                failures.append(f"{method} {name!r}{suffix}: {status} {body[:200]!r}")
    path = f"/v1/sessions/{session_id}"
    is_alive = request("GET", path)[0] == 200 and request("DELETE", path)[0] == 204
    print(json.dumps({"refused": dict(refused), "failures": len(failures), "alive": is_alive}))
    for failure in failures[:10]:
        print(failure, file=sys.stderr)
    return 0 if is_alive and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
