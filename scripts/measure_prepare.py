"""A corpus of any size through ``memtx prepare``: seconds, the most memory, and whether kills change a byte.

    python scripts/measure_prepare.py [--bytes 2e9] [--bpe-bytes 1e8] [--workers 2] [--kills 5] [--json FILE]

Half of the corpus is books of 400 kB, half rows of JSON of 2 kB, both of made-up words. It is prepared undisturbed,
then once more with SIGKILL at drawn moments and started again, and every file of the two results is compared. Memory is
the sum of the resident sizes of all its processes, looked at every 20 ms, so pages they share count more than once. A
part of it is then prepared with byte pairs, trained on it first.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import psutil
import torch

from memtx import files

BOOK, ROW = 400_000, 2_000
VOCABULARY = 50_000
PARAGRAPHS = 4_000


def paragraphs(drawn: np.random.Generator) -> list[str]:
    """Return paragraphs of about 500 characters, of words as frequent as Zipf has them."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzé"))
    words = ["".join(drawn.choice(letters, drawn.integers(1, 11))) for _ in range(VOCABULARY)]
    share = 1 / np.arange(1, VOCABULARY + 1)
    chosen = drawn.choice(VOCABULARY, (PARAGRAPHS, 90), p=share / share.sum())
    return [" ".join(words[one] for one in row).capitalize() + ".\n\n" for row in chosen]


def generate(root: Path, size: int, seed: int) -> tuple[list[Path], int]:
    """Write a corpus of about ``size`` bytes and return its two sources and how many documents they have."""
    pool = paragraphs(np.random.default_rng(seed))
    drawn = random.Random(seed)
    mean = sum(len(one.encode()) for one in pool) / len(pool)
    books, rows = root / "books", root / "rows"
    books.mkdir(parents=True)
    rows.mkdir()
    for number in range(round(size / 2 / BOOK)):
        text = "".join(drawn.choices(pool, k=round(drawn.uniform(0.5, 1.5) * BOOK / mean)))
        (books / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    left, table, documents = size / 2, 0, round(size / 2 / BOOK)
    while left > 0:
        with open(rows / f"{table:04d}.jsonl", "w", encoding="utf-8") as handle:
            for number in range(50_000):
                text = "".join(drawn.choices(pool, k=max(1, round(drawn.uniform(0.5, 1.5) * ROW / mean))))
                documents += 1
                left -= handle.write(json.dumps({"id": f"{table}-{number}", "text": text}, ensure_ascii=False) + "\n")
                if left <= 0:
                    break
        table += 1
    return [books, rows], documents


class Run:
    """One ``memtx prepare``, watched."""

    def __init__(self, sources: list[Path], out: Path, workers: int, tokenizer: str) -> None:
        command = [sys.executable, "-m", "memtx", "prepare", *map(str, sources), "--out", str(out)]
        command += ["--workers", str(workers), "--tokenizer", tokenizer, "--id-field", "id", "--json"]
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.peak = 0

    def watch(self, until: float = float("inf")) -> bool:
        """Watch memory until it ends or so many seconds have passed, and return whether it ended."""
        own = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            held = 0
            try:
                for one in [own, *own.children(recursive=True)]:
                    held += one.memory_info().rss
            except psutil.NoSuchProcess:
                pass
            self.peak = max(self.peak, held)
            if time.perf_counter() - self.began > until:
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> dict[str, Any]:
        """Wait for its end and return what it said."""
        self.watch()
        out, _ = self.process.communicate()
        if self.process.returncode:
            sys.exit(f"memtx prepare ended with code {self.process.returncode}.")
        return {**json.loads(out), "seconds": time.perf_counter() - self.began, "peak_bytes": self.peak}

    def kill(self) -> None:
        """Kill it as a power cut would; its workers notice."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def sums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder."""
    return {str(path.relative_to(folder)): files.checksum(path) for path in folder.rglob("*") if path.is_file()}


def measured(root: Path, size: int, arguments: argparse.Namespace, tokenizer: str, kills: int) -> dict[str, Any]:
    """Generate, prepare undisturbed, prepare with kills, and compare."""
    sources, documents = generate(root / "corpus", size, arguments.seed)
    real = sum(path.stat().st_size for source in sources for path in source.iterdir())
    whole = Run(sources, root / "whole", arguments.workers, tokenizer).finish()
    found = {
        "tokenizer": tokenizer,
        "source_bytes": real,
        "documents": documents,
        "documents_prepared": sum(one["documents"] for one in whole["splits"].values()),
        "tokens": sum(one["tokens"] for one in whole["splits"].values()),
        "seconds": whole["seconds"],
        "bytes_per_second": real / whole["seconds"],
        "peak_bytes": whole["peak_bytes"],
        "kills": 0,
    }
    assert found["documents_prepared"] == documents
    drawn = random.Random(arguments.seed)
    if kills:
        peaks = []
        for _ in range(kills):
            run = Run(sources, root / "killed", arguments.workers, tokenizer)
            ended = run.watch(drawn.uniform(0.5, 1.5) * whole["seconds"] / (kills + 1))
            peaks.append(run.peak)
            if ended:
                break
            run.kill()
            found["kills"] += 1
        peaks.append(Run(sources, root / "killed", arguments.workers, tokenizer).finish()["peak_bytes"])
        found["peak_bytes"] = max(found["peak_bytes"], *peaks)
        found["same_bytes"] = sums(root / "killed") == sums(root / "whole")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=2e9, help="of the corpus that is prepared byte by byte")
    parser.add_argument("--bpe-bytes", type=float, default=1e8, help="of the one for byte pairs; 0 for none")
    parser.add_argument("--vocab", type=int, default=32_000, help="of the byte pairs")
    parser.add_argument("--workers", type=measuring.positive, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="all figures; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    found = []
    for size, tokenizer, kills in (
        (arguments.bytes, "byte", arguments.kills),
        (arguments.bpe_bytes, str(arguments.vocab), min(arguments.kills, 2)),
    ):
        if size:
            with tempfile.TemporaryDirectory() as root:
                found.append(measured(Path(root), int(size), arguments, tokenizer, kills))
    where = measuring.machine(torch.device("cpu"))
    table = [
        f"| {where['device']}, {where['cpus']} CPUs, {arguments.workers} workers, {where['when'][:10]} "
        "| corpus | documents | seconds | MB/s | most memory | killed | same bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        name = "bytes" if one["tokenizer"] == "byte" else f"byte pairs, {int(one['tokenizer']):,}, trained first"
        table.append(
            f"| {name} | {one['source_bytes'] / 1e6:,.0f} MB | {one['documents']:,} | {one['seconds']:,.0f} "
            f"| {one['bytes_per_second'] / 1e6:.1f} | {one['peak_bytes'] / 2**20:,.0f} MiB | {one['kills']} times "
            f"| {'yes' if one.get('same_bytes', True) else 'NO'} |"
        )
    measuring.deliver(arguments, {"runs": found, "machine": where}, table)
    return 0 if all(one.get("same_bytes", True) for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
