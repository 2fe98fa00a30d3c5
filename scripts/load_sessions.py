"""Many clients at once against a running server: each has a session of its own, whose numbers are its own check.

    memtx serve --checkpoint RUN --port 8000 &
    python scripts/load_sessions.py http://127.0.0.1:8000 [--num-sessions 64] [--duration 180] [--json FILE]

Every client feeds its text in pieces, ends it, and compares what came with what the server said of the same text when
nobody else was there; then it does a continuation with a fixed seed twice. Printed: requests, errors, answers that
were another session's, the median and the 99th percentile of the time to answer, and the server's memory: the medians
over a ninth of the time after the first third, which is for warming up, and over the last ninth, and the most there
was. The server must be on this machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from asking import Connection, local_url

SENTENCE = "the sea was calm and a grey gull cried over the long wet sand while nobody came to the old harbour"


@dataclass
class Tally:
    """What all clients saw."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One connection, whose answers are taken down."""

    def __init__(self, url: str, tally: Tally) -> None:
        self.connection = Connection(url, timeout=600)
        self.tally = tally

    def request(self, kind: str, method: str, path: str, body: Any = None) -> Any:
        """Return the answer's JSON, and take down its time or its error."""
        began = time.perf_counter()
        status, content = self.connection.request(method, path, json.dumps(body) if body is not None else None)
        took = time.perf_counter() - began
        with self.tally.lock:
            self.tally.times.setdefault(kind, []).append(took)
            if status >= 400:
                self.tally.errors.append(f"{kind}: {status} {content[:200].decode('utf-8', 'replace')}")
        return json.loads(content) if content and status < 400 else None


def make_text(index: int, num_words: int) -> str:
    """Return the text of a client: its number decides every word."""
    drawn, words_known = random.Random(index), SENTENCE.split()
    return " ".join(drawn.choice(words_known) for _ in range(num_words)) + f" {index}.\n"


def run_session(client: Client, text: str, seed: int) -> tuple[float, int, str] | None:
    """Read a text in a session of its own and go on with it; return what was found, None after an error."""
    made = client.request("create", "POST", "/v1/sessions", {})
    if made is None:
        return None
    path = f"/v1/sessions/{made['id']}"
    info, third = None, len(text) // 3 + 1
    for at in range(0, len(text), third):
        last = at + third >= len(text)
        info = client.request("feed", "POST", f"{path}/feed", {"text": text[at : at + third], "end_of_text": last})
    body = {"max_tokens": 16, "temperature": 0, "seed": seed}
    answer = client.request("generate", "POST", f"{path}/generate", body)
    client.request("delete", "DELETE", path)
    if info is None or answer is None:
        return None
    return info["nll"], info["tokens"], answer["choices"][0]["text"]


def run_client(url: str, tally: Tally, index: int, text: str, expected: Any, deadline: float) -> None:
    """Visit again and again until the time is over."""
    client = Client(url, tally)
    while time.monotonic() < deadline:
        try:
            found = run_session(client, text, index)
        except (OSError, http.client.HTTPException) as error:
            with tally.lock:
                tally.errors.append(f"{type(error).__name__}: {error}")
            return
        # Sums in another order may differ in the last bits, another text's in the first; a greedy choice between
        # equals may fall the other way, so the text is the weaker sign and its beginning must agree.
        if found is not None and (found[1] != expected[1] or abs(found[0] - expected[0]) > 1e-4 * abs(expected[0])):
            with tally.lock:
                tally.mismatches.append(f"client {index}: {found[:2]} instead of {expected[:2]}")


def percentile(values: list[float], fraction: float) -> float:
    """Return the value below which the share of all lies."""
    return sorted(values)[min(int(fraction * len(values)), len(values) - 1)]


def sample_memory(connection: Connection, duration: float) -> list[float]:
    """Return the server's memory in bytes, looked at a hundred times."""
    found = []
    for _ in range(100):
        time.sleep(duration / 100)
        found.append(connection.get_metric("process_resident_memory_bytes"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", type=local_url, help="of a server on this machine")
    parser.add_argument("--num-sessions", type=int, default=64)
    parser.add_argument("--duration", type=float, default=180.0)
    parser.add_argument("--num-words", type=int, default=300, help="of each text")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    arguments = parser.parse_args()
    tally, before_all = Tally(), Client(arguments.url, Tally())
    texts = [make_text(number, arguments.num_words) for number in range(arguments.num_sessions)]
    alone = [run_session(before_all, text, number) for number, text in enumerate(texts)]
    if None in alone:
        print(before_all.tally.errors[0], file=sys.stderr)
        return 1
    quiet = before_all.connection
    until = time.monotonic() + arguments.duration
    threads = [
        threading.Thread(target=run_client, args=(arguments.url, tally, number, text, alone[number], until))
        for number, text in enumerate(texts)
    ]
    before = {
        name: quiet.get_metric(f"memtx_{name}")
        for name in ("score_segments", "score_calls", "decode_tokens", "decode_calls")
    }
    for thread in threads:
        thread.start()
    memory = sample_memory(quiet, arguments.duration)
    for thread in threads:
        thread.join()
    # The system's figure goes up and down with every call's tensors: single looks would say whatever one likes.
    warm, end = statistics.median(memory[33:44]), statistics.median(memory[-11:])
    after = {name: quiet.get_metric(f"memtx_{name}") - value for name, value in before.items()}
    found = {
        "sessions": arguments.num_sessions,
        "seconds": arguments.duration,
        "requests": sum(map(len, tally.times.values())),
        "errors": len(tally.errors),
        "mismatches": len(tally.mismatches),
        "segments_per_score_call": after["score_segments"] / max(after["score_calls"], 1),
        "tokens_per_decode_call": after["decode_tokens"] / max(after["decode_calls"], 1),
        "memory_warm_bytes": warm,
        "memory_end_bytes": end,
        "memory_peak_bytes": max(memory),
        "memory_growth": end / warm - 1,
        "latency_ms": {
            kind: {"p50": 1000 * statistics.median(times), "p99": 1000 * percentile(times, 0.99), "n": len(times)}
            for kind, times in tally.times.items()
        },
    }
    if arguments.json == "-":
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name}: {json.dumps(value)}")
    for wrong in (*tally.errors[:5], *tally.mismatches[:5]):
        print(wrong, file=sys.stderr)
    return 1 if tally.errors or tally.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
