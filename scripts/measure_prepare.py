"""A corpus of any size through ``memtx prepare``: seconds, the most memory, and whether kills change a byte.

    python scripts/measure_prepare.py [--corpus-bytes 2e9] [--bpe-corpus-bytes 1e8] [--num-workers 2] [--kills 5]
        [--json FILE]

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

BOOK_BYTES, ROW_BYTES = 400_000, 2_000
VOCABULARY_SIZE = 50_000
NUM_PARAGRAPHS = 4_000


def make_paragraphs(rng: np.random.Generator) -> list[str]:
    """Return paragraphs of about 500 characters, of words as frequent as Zipf has them."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzé"))
    words = ["".join(rng.choice(letters, rng.integers(1, 11))) for _ in range(VOCABULARY_SIZE)]
    share = 1 / np.arange(1, VOCABULARY_SIZE + 1)
    chosen = rng.choice(VOCABULARY_SIZE, (NUM_PARAGRAPHS, 90), p=share / share.sum())
    return [" ".join(words[one] for one in row).capitalize() + ".\n\n" for row in chosen]


def generate_corpus(root: Path, num_bytes: int, seed: int) -> tuple[list[Path], int]:
    """Write a corpus of about ``num_bytes`` bytes and return its two sources and how many documents they have."""
    pool = make_paragraphs(np.random.default_rng(seed))
    drawn = random.Random(seed)
    mean = sum(len(one.encode()) for one in pool) / len(pool)
    books, rows = root / "books", root / "rows"
    books.mkdir(parents=True)
    rows.mkdir()
    for number in range(round(num_bytes / 2 / BOOK_BYTES)):
        text = "".join(drawn.choices(pool, k=round(drawn.uniform(0.5, 1.5) * BOOK_BYTES / mean)))
        (books / f"{number:06d}.txt").write_text(text, encoding="utf-8")
    left, table, documents = num_bytes / 2, 0, round(num_bytes / 2 / BOOK_BYTES)
    while left > 0:
        with open(rows / f"{table:04d}.jsonl", "w", encoding="utf-8") as handle:
            for number in range(50_000):
                text = "".join(drawn.choices(pool, k=max(1, round(drawn.uniform(0.5, 1.5) * ROW_BYTES / mean))))
                documents += 1
                left -= handle.write(json.dumps({"id": f"{table}-{number}", "text": text}, ensure_ascii=False) + "\n")
                if left <= 0:
                    break
        table += 1
    return [books, rows], documents


class PrepareProcess:
    """One ``memtx prepare``, watched."""

    def __init__(self, sources: list[Path], output_dir: Path, num_workers: int, tokenizer: str) -> None:
        command = [sys.executable, "-m", "memtx", "prepare", *map(str, sources), "--output-dir", str(output_dir)]
        command += ["--num-workers", str(num_workers), "--tokenizer", tokenizer, "--id-column", "id", "--json"]
        self.start_time = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.peak_bytes = 0

    def watch(self, timeout: float = float("inf")) -> bool:
        """Watch memory until it ends or so many seconds have passed, and return whether it ended."""
        own = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            held = 0
            try:
                for one in [own, *own.children(recursive=True)]:
                    held += one.memory_info().rss
            except psutil.NoSuchProcess:
                pass
            self.peak_bytes = max(self.peak_bytes, held)
            if time.perf_counter() - self.start_time > timeout:
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> dict[str, Any]:
        """Wait for its end and return what it said."""
        self.watch()
        out, _ = self.process.communicate()
        if self.process.returncode:
            sys.exit(f"memtx prepare ended with code {self.process.returncode}.")
        return {**json.loads(out), "seconds": time.perf_counter() - self.start_time, "peak_bytes": self.peak_bytes}

    def kill(self) -> None:
        """Kill it as a power cut would; its workers notice."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder."""
    return {str(path.relative_to(folder)): files.checksum(path) for path in folder.rglob("*") if path.is_file()}


def measure(root: Path, num_bytes: int, arguments: argparse.Namespace, tokenizer: str, kills: int) -> dict[str, Any]:
    """Generate, prepare undisturbed, prepare with kills, and compare."""
    sources, documents = generate_corpus(root / "corpus", num_bytes, arguments.seed)
    real = sum(path.stat().st_size for source in sources for path in source.iterdir())
    whole = PrepareProcess(sources, root / "whole", arguments.num_workers, tokenizer).finish()
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
            run = PrepareProcess(sources, root / "killed", arguments.num_workers, tokenizer)
            ended = run.watch(drawn.uniform(0.5, 1.5) * whole["seconds"] / (kills + 1))
            peaks.append(run.peak_bytes)
            if ended:
                break
            run.kill()
            found["kills"] += 1
        peaks.append(PrepareProcess(sources, root / "killed", arguments.num_workers, tokenizer).finish()["peak_bytes"])
        found["peak_bytes"] = max(found["peak_bytes"], *peaks)
        found["same_bytes"] = checksums(root / "killed") == checksums(root / "whole")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-bytes", type=float, default=2e9, help="of the corpus that is prepared byte by byte")
    parser.add_argument("--bpe-corpus-bytes", type=float, default=1e8, help="of the one for byte pairs; 0 for none")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the byte pairs")
    parser.add_argument("--num-workers", type=measuring.positive_int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="all figures; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    found = []
    for size, tokenizer, kills in (
        (arguments.corpus_bytes, "byte", arguments.kills),
        (arguments.bpe_corpus_bytes, str(arguments.vocab_size), min(arguments.kills, 2)),
    ):
        if size:
            with tempfile.TemporaryDirectory() as root:
                found.append(measure(Path(root), int(size), arguments, tokenizer, kills))
    where = measuring.machine_info(torch.device("cpu"))
    table = [
        f"| {where['device']}, {where['cpus']} CPUs, {arguments.num_workers} workers, {where['when'][:10]} "
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
    measuring.write_results(arguments, {"runs": found, "machine": where}, table)
    return 0 if all(one.get("same_bytes", True) for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
