"""Measure how much faster a server answers a prompt that begins as one that it has read.

    memtx serve --checkpoint RUN --port 8000 &
    python scripts/measure_prefix_cache.py http://127.0.0.1:8000 [--num-words 20000] [--num-prompts 10000] [--json FILE]

Prints the seconds until one token is generated: of a new prompt, of the same prompt again, of the prompt with another
question at its end, and of that question again. Then sends ``--num-prompts`` random prompts and prints the largest size
of the cache and of the process. The prompts are new in every run.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import statistics
import sys
import time
from typing import Any

from http_client import Connection, local_url
from load_sessions import make_text


def complete(connection: Connection, model: str, prompt: str) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a request for one token, and its usage."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0})
    start = time.perf_counter()
    status, content = connection.request("POST", "/v1/completions", body)
    if status >= 400:
        raise SystemExit(content.decode("utf-8", "replace"))
    return time.perf_counter() - start, json.loads(content)["usage"]


def measure_speed(connection: Connection, model: str, text: str) -> dict[str, Any]:
    """Return seconds, ratio to the first request and cached tokens of each kind of request."""
    results: dict[str, Any] = {}
    questions = {"new prompt": "", "same prompt": "", "other question": " who cried?", "same question": " who cried?"}
    for name, question in questions.items():
        # The first is measured once: it is new only once.
        runs = [complete(connection, model, text + question) for _ in range(5 if name.startswith("same") else 1)]
        seconds, usage = statistics.median(run[0] for run in runs), runs[0][1]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        first = results["new prompt"]["seconds"] if results else seconds
        ratio = round(first / seconds, 1)
        results[name] = {"seconds": round(seconds, 4), "times_faster": ratio, "tokens": usage["prompt_tokens"]}
        results[name]["cached_tokens"] = cached
    return results


def fill_cache(connection: Connection, model: str, num_prompts: int, seed: int) -> dict[str, float]:
    """Send random prompts of 50 to 500 words; return the maximum of the server's sizes in bytes."""
    names = ("memtx_prefix_cache_bytes", "memtx_prefix_cache_disk_bytes", "process_resident_memory_bytes")
    sizes = dict.fromkeys(names, 0.0)
    for index in range(num_prompts):
        complete(connection, model, f"{seed + index} " + make_text(seed + index, random.Random(index).randint(50, 500)))
        if index % 20 == 0 or index == num_prompts - 1:
            sizes = {name: max(size, connection.get_metric(name)) for name, size in sizes.items()}
    return sizes | {"evictions": connection.get_metric("memtx_prefix_cache_evictions")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", type=local_url, help="address of a server on this machine")
    parser.add_argument("--num-words", type=int, default=20_000, help="words of the long prompt")
    parser.add_argument("--num-prompts", type=int, default=0, help="number of random prompts")
    parser.add_argument("--json", metavar="FILE", help="write all figures; - prints one JSON object")
    arguments = parser.parse_args()
    connection, seed = Connection(arguments.url, timeout=600), secrets.randbits(40)
    model = json.loads(connection.request("GET", "/v1/models")[1])["data"][0]["id"]
    complete(connection, model, f"{seed} warm up")
    results: dict[str, Any] = measure_speed(connection, model, f"{seed} " + make_text(seed, arguments.num_words))
    num_bytes, count = (connection.get_metric(f"memtx_prefix_cache_{name}") for name in ("bytes", "snapshots"))
    results["snapshots"] = {"count": count, "bytes_each": round(num_bytes / max(count, 1))}
    if arguments.num_prompts:
        results["random prompts"] = fill_cache(connection, model, arguments.num_prompts, seed)
    if arguments.json == "-":
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name}: {json.dumps(value)}")
    if arguments.json not in (None, "-"):
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
