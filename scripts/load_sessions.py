"""Run many clients against a server, each with its own sessions, and check that no session gets another's results.

    memtx serve --checkpoint RUN --port 8000 &
    python scripts/load_sessions.py http://127.0.0.1:8000 [--num-sessions 64] [--num-short 8] [--duration 180]

Every client feeds its text in three requests, ends it, generates a continuation, and compares the NLL with that of the
same text on the idle server. The texts of the additional ``--num-short`` clients are short, to show that they do not
wait for long ones. Prints requests, errors, mismatches, median and 99th percentile of the latency, and the server's
memory: the peak, the median over a ninth of the time after the first third (warm-up), and over the last ninth.
``full_load_ms`` is the time in which the server, at its rate, reads one text of every client: while all of them read
at once, no scheduler makes the mean shorter. The server must be on this machine.
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

from http_client import Connection, local_url

SENTENCE = "the sea was calm and a grey gull cried over the long wet sand while nobody came to the old harbour"


@dataclass
class Tally:
    """Results of all clients."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """A connection that records every response, with ``prefix`` before the kind of request."""

    def __init__(self, url: str, tally: Tally, prefix: str = "") -> None:
        self.connection = Connection(url, timeout=600)
        self.tally, self.prefix = tally, prefix

    def request(self, kind: str, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of a response, and record its time or its error."""
        start = time.perf_counter()
        status, content = self.connection.request(method, path, json.dumps(body) if body is not None else None)
        seconds = time.perf_counter() - start
        with self.tally.lock:
            self.tally.times.setdefault(self.prefix + kind, []).append(seconds)
            if status >= 400:
                self.tally.errors.append(f"{kind}: {status} {content[:200].decode('utf-8', 'replace')}")
        return json.loads(content) if content and status < 400 else None


def make_text(index: int, num_words: int) -> str:
    """Return random words with ``index`` as the seed."""
    return " ".join(random.Random(index).choices(SENTENCE.split(), k=num_words)) + f" {index}.\n"


def run_session(client: Client, text: str, seed: int) -> tuple[float, int, str] | None:
    """Read a text in a new session and generate; return NLL, tokens and generated text, or None after an error."""
    session = client.request("create", "POST", "/v1/sessions", {})
    if session is None:
        return None
    path = f"/v1/sessions/{session['id']}"
    info, third = None, len(text) // 3 + 1
    for start in range(0, len(text), third):
        body = {"text": text[start : start + third], "end_of_text": start + third >= len(text)}
        info = client.request("feed", "POST", f"{path}/feed", body)
    options = {"max_tokens": 16, "temperature": 0, "seed": seed}
    completion = client.request("generate", "POST", f"{path}/generate", options)
    client.request("delete", "DELETE", path)
    if info is None or completion is None:
        return None
    return info["nll"], info["tokens"], completion["choices"][0]["text"]


def run_client(client: Client, index: int, text: str, expected: Any, deadline: float) -> None:
    """Run sessions until the deadline, and compare each with the expected result."""
    tally = client.tally
    while time.monotonic() < deadline:
        try:
            result = run_session(client, text, index)
        except (OSError, http.client.HTTPException) as error:
            with tally.lock:
                tally.errors.append(f"{type(error).__name__}: {error}")
            return
        # Another batch may change the last bits of the NLL; another text changes the first. The generated text is not
        # compared, because a greedy choice between equally likely tokens may depend on the last bits.
        if result is not None and (result[1] != expected[1] or abs(result[0] - expected[0]) > 1e-4 * abs(expected[0])):
            with tally.lock:
                tally.mismatches.append(f"client {index}: {result[:2]} instead of {expected[:2]}")


def percentile(values: list[float], fraction: float) -> float:
    """Return the value below which ``fraction`` of all values lie."""
    return sorted(values)[min(int(fraction * len(values)), len(values) - 1)]


def sample_memory(connection: Connection, duration: float) -> list[float]:
    """Return 100 samples of the server's memory in bytes."""
    samples = []
    for _ in range(100):
        time.sleep(duration / 100)
        samples.append(connection.get_metric("process_resident_memory_bytes"))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", type=local_url, help="address of a server on this machine")
    parser.add_argument("--num-sessions", type=int, default=64)
    parser.add_argument("--duration", type=float, default=180.0)
    parser.add_argument("--num-words", type=int, default=300, help="words of each text")
    parser.add_argument("--num-short", type=int, default=0, help="additional clients with short texts")
    parser.add_argument("--num-short-words", type=int, default=10, help="words of each short text")
    parser.add_argument("--json", metavar="FILE", help="write all figures; - prints one JSON object")
    arguments = parser.parse_args()
    tally, warmup = Tally(), Client(arguments.url, Tally())
    lengths = [arguments.num_words] * arguments.num_sessions + [arguments.num_short_words] * arguments.num_short
    texts = [make_text(index, num_words) for index, num_words in enumerate(lengths)]
    expected = [run_session(warmup, text, index) for index, text in enumerate(texts)]
    if None in expected:
        print(warmup.tally.errors[0], file=sys.stderr)
        return 1
    connection = warmup.connection
    deadline = time.monotonic() + arguments.duration
    clients = [
        Client(arguments.url, tally, "" if index < arguments.num_sessions else "short ") for index in range(len(texts))
    ]
    threads = [
        threading.Thread(target=run_client, args=(client, index, text, expected[index], deadline))
        for index, (client, text) in enumerate(zip(clients, texts, strict=True))
    ]
    names = ("score_segments", "score_calls", "decode_tokens", "decode_calls", "tokens_read")
    before = {name: connection.get_metric(f"memtx_{name}") for name in names}
    start = time.monotonic()
    for thread in threads:
        thread.start()
    memory = sample_memory(connection, arguments.duration)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    # Medians, because the memory goes up and down with the tensors of every call.
    warm, end = statistics.median(memory[33:44]), statistics.median(memory[-11:])
    counts = {name: connection.get_metric(f"memtx_{name}") - value for name, value in before.items()}
    tokens_per_second = counts["tokens_read"] / seconds
    results = {
        "sessions": len(texts),
        "seconds": arguments.duration,
        "requests": sum(map(len, tally.times.values())),
        "errors": len(tally.errors),
        "mismatches": len(tally.mismatches),
        "segments_per_score_call": counts["score_segments"] / max(counts["score_calls"], 1),
        "tokens_per_decode_call": counts["decode_tokens"] / max(counts["decode_calls"], 1),
        "tokens_per_second": tokens_per_second,
        "full_load_ms": 1000 * sum(result[1] for result in expected if result) / tokens_per_second,
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
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name}: {json.dumps(value)}")
    for failure in (*tally.errors[:5], *tally.mismatches[:5]):
        print(failure, file=sys.stderr)
    return 1 if tally.errors or tally.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
