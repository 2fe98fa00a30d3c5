"""Measure `memtx prepare` on a corpus of any size: seconds, peak memory, and the effect of kills on the result.

    python scripts/measure_prepare.py [--corpus-bytes 2e9] [--bpe-corpus-bytes 1e8] [--num-workers 2] [--kills 5]
        [--json FILE]

Half of the corpus is books of 400 kB, half rows of JSON of 2 kB, both of made-up words. It is prepared undisturbed and
once more with SIGKILL at random times and restarts; all files of the two results must be equal. Memory is the sum of
the resident sizes of all processes, sampled every 20 ms, so shared pages count more than once. A smaller corpus is
then prepared with byte pairs that are trained on it first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmarking
import numpy as np
import psutil
import torch
from training_runs import memtx_command, memtx_environment

from memtx import files

BOOK_BYTES, ROW_BYTES = 400_000, 2_000
VOCABULARY_SIZE = 50_000
NUM_PARAGRAPHS = 4_000


def make_paragraphs(rng: np.random.Generator) -> list[str]:
    """Return paragraphs of about 500 characters with Zipf-distributed words."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzé"))
    words = ["".join(rng.choice(letters, rng.integers(1, 11))) for _ in range(VOCABULARY_SIZE)]
    weights = 1 / np.arange(1, VOCABULARY_SIZE + 1)
    indices = rng.choice(VOCABULARY_SIZE, (NUM_PARAGRAPHS, 90), p=weights / weights.sum())
    return [" ".join(words[index] for index in paragraph).capitalize() + ".\n\n" for paragraph in indices]


def generate_corpus(root: Path, num_bytes: int, seed: int) -> tuple[list[Path], int]:
    """Write a corpus of about ``num_bytes`` bytes; return its two sources and the number of documents."""
    paragraphs = make_paragraphs(np.random.default_rng(seed))
    rng = random.Random(seed)
    mean = sum(len(paragraph.encode()) for paragraph in paragraphs) / len(paragraphs)

    def make_text(size: int) -> str:
        return "".join(rng.choices(paragraphs, k=max(1, round(rng.uniform(0.5, 1.5) * size / mean))))

    books, tables = root / "books", root / "rows"
    books.mkdir(parents=True)
    tables.mkdir()
    num_documents = round(num_bytes / 2 / BOOK_BYTES)
    for index in range(num_documents):
        (books / f"{index:06d}.txt").write_text(make_text(BOOK_BYTES), encoding="utf-8")
    remaining, table = num_bytes / 2, 0
    while remaining > 0:
        with open(tables / f"{table:04d}.jsonl", "w", encoding="utf-8") as file:
            for index in range(50_000):
                row = {"id": f"{table}-{index}", "text": make_text(ROW_BYTES)}
                remaining -= file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_documents += 1
                if remaining <= 0:
                    break
        table += 1
    return [books, tables], num_documents


class PrepareProcess:
    """A process of ``memtx prepare`` whose memory is watched."""

    def __init__(self, sources: list[Path], output_dir: Path, num_workers: int, tokenizer: str) -> None:
        command = memtx_command(
            "prepare", *map(str, sources), "--output-dir", str(output_dir), "--num-workers", str(num_workers),
            "--tokenizer", tokenizer, "--id-column", "id", "--json",
        )  # fmt: skip
        self.start_time = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=memtx_environment())
        self.peak_bytes = 0

    def watch(self, timeout: float = float("inf")) -> bool:
        """Watch memory until the process ends or ``timeout`` seconds have passed; return True if it ended."""
        parent = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            resident_bytes = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [parent, *parent.children(recursive=True)]:
                    resident_bytes += process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, resident_bytes)
            if time.perf_counter() - self.start_time > timeout:
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> dict[str, Any]:
        """Wait for the process to end and return its JSON output, with seconds and peak memory."""
        self.watch()
        out, _ = self.process.communicate()
        if self.process.returncode:
            sys.exit(f"memtx prepare exited with code {self.process.returncode}.")
        return {**json.loads(out), "seconds": time.perf_counter() - self.start_time, "peak_bytes": self.peak_bytes}

    def kill(self) -> None:
        """Kill the process by SIGKILL; its workers end by themselves."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of all files below a folder."""
    return {str(path.relative_to(folder)): files.checksum(path) for path in folder.rglob("*") if path.is_file()}


def measure(root: Path, num_bytes: int, arguments: argparse.Namespace, tokenizer: str, kills: int) -> dict[str, Any]:
    """Generate a corpus, prepare it undisturbed and with kills, and compare the results."""
    sources, num_documents = generate_corpus(root / "corpus", num_bytes, arguments.seed)
    source_bytes = sum(path.stat().st_size for source in sources for path in source.iterdir())

    def start(name: str) -> PrepareProcess:
        return PrepareProcess(sources, root / name, arguments.num_workers, tokenizer)

    undisturbed = start("undisturbed").finish()
    splits = undisturbed["splits"].values()
    result = {
        "tokenizer": tokenizer, "source_bytes": source_bytes, "documents": num_documents,
        "documents_prepared": sum(split["documents"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits), "seconds": undisturbed["seconds"],
        "bytes_per_second": source_bytes / undisturbed["seconds"], "peak_bytes": undisturbed["peak_bytes"], "kills": 0,
    }  # fmt: skip
    assert result["documents_prepared"] == num_documents
    rng = random.Random(arguments.seed)
    if kills:
        peaks = []
        for _ in range(kills):
            process = start("killed")
            is_finished = process.watch(rng.uniform(0.5, 1.5) * undisturbed["seconds"] / (kills + 1))
            peaks.append(process.peak_bytes)
            if is_finished:
                break
            process.kill()
            result["kills"] += 1
        peaks.append(start("killed").finish()["peak_bytes"])
        result["peak_bytes"] = max(result["peak_bytes"], *peaks)
        result["same_bytes"] = checksums(root / "killed") == checksums(root / "undisturbed")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus-bytes", type=float, default=2e9, help="corpus for the byte tokenizer; 0 disables it")
    parser.add_argument("--bpe-corpus-bytes", type=float, default=1e8, help="corpus for byte pairs; 0 disables it")
    benchmarking.add_size_options(parser, vocab_size=32_000, num_workers=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    benchmarking.add_output_options(parser)
    arguments = parser.parse_args()
    results = []
    for size, tokenizer, kills in (
        (arguments.corpus_bytes, "byte", arguments.kills),
        (arguments.bpe_corpus_bytes, str(arguments.vocab_size), min(arguments.kills, 2)),
    ):
        if size:
            with tempfile.TemporaryDirectory() as root:
                results.append(measure(Path(root), int(size), arguments, tokenizer, kills))
    machine = benchmarking.machine_info(torch.device("cpu"))
    lines = [
        f"| {machine['device']}, {machine['cpus']} CPUs, {arguments.num_workers} workers, {machine['when'][:10]} "
        "| corpus | documents | seconds | MB/s | peak memory | kills | same bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        name = "bytes" if row["tokenizer"] == "byte" else f"byte pairs, {int(row['tokenizer']):,}, trained first"
        lines.append(
            f"| {name} | {row['source_bytes'] / 1e6:,.0f} MB | {row['documents']:,} | {row['seconds']:,.0f} "
            f"| {row['bytes_per_second'] / 1e6:.1f} | {benchmarking.format_mib(row['peak_bytes'])} MiB "
            f"| {row['kills']} | {'yes' if row.get('same_bytes', True) else 'NO'} |"
        )
    benchmarking.write_results(arguments, {"runs": results, "machine": machine}, lines)
    return 0 if all(row.get("same_bytes", True) for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
