"""Measure the speed and memory of reading along one stream: both must stay constant.

    python scripts/measure_read.py [--tokens N] [--checkpoint CKPT] [--root FOLDER] [--plot PNG] [--json] [--check]

Reads books one after the other, again from the first when they end, with the StreamReader and the report of `memtx
read`. Without a checkpoint, a small random model is made: speed and memory do not depend on the weights. The machine's
own speed may drift by more than a tenth in a minute, so the second tenth of the stream is read again, from a fork made
there, alternating with the last tenth interval by interval; the ratio is the median over these pairs. With --check, the
exit code is 1 unless the peak memory stays within 2% of that after the first 50,000 tokens, and the speed of the last
tenth within 5% of the second tenth's. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarking import MIB, add_data_option, add_size_options
from numpy.typing import NDArray

from memtx import files
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.cli.read import CHUNK_BYTES
from memtx.cli.report import ReadingReport
from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.reader import StreamReader
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.malloc import peak_memory_bytes

NUM_INTERVALS = 100
"""Equal parts of the stream that are measured one by one; the second tenth is ten of them."""

WARMUP_TOKENS = 50_000
"""Tokens after which memory must not grow."""

MEMORY_BOUND, SPEED_BOUND = 0.02, 0.05


def save_small_model(folder: Path) -> Path:
    """Save a random byte-level model: 4 layers of 128, window 256, 128 compressed entries of 4 positions."""
    torch.manual_seed(0)
    memories = [partial(CompressedMemory, window=256, compression_rate=4, num_entries=128)]
    MemoryTransformer(257, dim=128, depth=4, heads=4, memories=memories).save_pretrained(folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def repeat_books(root: Path | None) -> Iterator[bytes]:
    """Yield the books in chunks, endlessly; made-up words if there are no books."""
    books = sorted(root.rglob("*.txt")) if root is not None else []
    if not books:
        words = [f"w{index}" for index in np.random.default_rng(0).integers(0, 5000, 20_000)]
        text = " ".join(words).encode()
        while True:
            yield from (text[start : start + CHUNK_BYTES] for start in range(0, len(text), CHUNK_BYTES))
    while True:
        for book in books:
            with book.open("rb") as handle:
                yield from iter(partial(handle.read, CHUNK_BYTES), b"")


def resident_bytes() -> int:
    """Return the memory of the process; its peak if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes(torch.device("cpu"))
    return pages * os.sysconf("SC_PAGE_SIZE")


class Stream:
    """A reader and its input."""

    def __init__(self, reader: StreamReader, chunks: Iterator[bytes]) -> None:
        self.reader = reader
        self.report = ReadingReport(10_000, quiet=True)
        self._results = (result for chunk in chunks for result in reader.feed(chunk))

    def read_until(self, end: int) -> float:
        """Read up to token ``end``; return tokens per second."""
        start, first_token, num_tokens = time.perf_counter(), self.reader.totals.num_tokens, 0
        while num_tokens < end:
            result = next(self._results)
            self.report.add(result)
            num_tokens = result.end
        return (num_tokens - first_token) / (time.perf_counter() - start)


def measure(reader: StreamReader, tokens: int, root: Path | None) -> dict[str, NDArray[np.float64] | float]:
    """Read ``tokens`` tokens; return the figures of every interval and of the whole stream."""
    tenth = NUM_INTERVALS // 10
    ends = [tokens * (index + 1) // NUM_INTERVALS for index in range(NUM_INTERVALS)]
    rates, memory, early_rates = np.zeros(NUM_INTERVALS), np.zeros(NUM_INTERVALS), np.zeros(tenth)
    warm_peak = 0
    early_chunks: list[bytes] = []
    early: Stream | None = None

    def read_chunks() -> Iterator[bytes]:
        for chunk in repeat_books(root):
            if tenth <= index <= 2 * tenth:
                early_chunks.append(chunk)
            yield chunk

    index = 0
    start = time.perf_counter()
    late = Stream(reader, read_chunks())
    for index in range(NUM_INTERVALS):
        if index == tenth:
            # Both streams finish the current chunk; the fork then continues with the saved ones.
            early = Stream(reader.fork(), iter(early_chunks))
        rates[index] = late.read_until(ends[index])
        memory[index] = resident_bytes()
        if not warm_peak and ends[index] >= WARMUP_TOKENS:
            warm_peak = peak_memory_bytes(reader.device)
        if index >= NUM_INTERVALS - tenth:
            assert early is not None
            pair = index - (NUM_INTERVALS - tenth)
            early_rates[pair] = early.read_until(ends[tenth + pair])
    return {
        "tokens": reader.totals.num_tokens,
        "seconds": time.perf_counter() - start,
        # Medians of ten intervals, so that one interruption of the process does not count.
        "second_tenth_tokens_per_second": statistics.median(early_rates),
        "last_tenth_tokens_per_second": statistics.median(rates[-tenth:]),
        "last_to_second_tenth": statistics.median(rates[-tenth:] / early_rates),
        "peak_bytes_after_warmup": warm_peak or peak_memory_bytes(reader.device),
        "peak_bytes": peak_memory_bytes(reader.device),
        "state_bytes": reader.state.nbytes,
        "tokens_per_second": rates,
        "resident_bytes": memory,
    }


def plot_results(path: str, tokens: int, rates: NDArray[np.float64], resident_bytes: NDArray[np.float64]) -> None:
    """Plot rate and memory along the stream, on axes that begin at zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    position = (np.arange(NUM_INTERVALS) + 1) * tokens / NUM_INTERVALS / 1e3
    panels = zip(figure.subplots(1, 2), (("tokens/s", rates), ("resident MiB", resident_bytes / MIB)), strict=True)
    for axes, (name, values) in panels:
        axes.plot(position, values, color="#2b6cb0", linewidth=1.5)
        axes.set_ylim(0, values.max() * 1.15)
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("thousand tokens read", fontsize=9)
        axes.grid(True, color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, tokens=1_000_000, segment_length=512)
    parser.add_argument("--checkpoint", help="run or checkpoint to read with; defaults to a small random model")
    add_data_option(parser, "--root", "pg19-mini", text="folder of .txt files, else made-up words", required=False)
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound does not hold")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model_and_tokenizer(arguments.checkpoint or save_small_model(Path(folder)))
    results = measure(StreamReader(model, tokenizer, arguments.segment_length), arguments.tokens, arguments.root)
    rates, resident_bytes = np.asarray(results.pop("tokens_per_second")), np.asarray(results.pop("resident_bytes"))
    figures = {name: float(value) for name, value in results.items()}
    growth = figures["peak_bytes"] / figures["peak_bytes_after_warmup"] - 1
    drift = figures["last_to_second_tenth"] - 1
    holds = growth <= MEMORY_BOUND and abs(drift) <= SPEED_BOUND
    if arguments.plot:
        plot_results(arguments.plot, arguments.tokens, rates, resident_bytes)
    if arguments.json:
        print(json.dumps({**figures, "memory_growth": growth, "speed_drift": drift, "holds": holds}))
    else:
        print(
            f"| {figures['tokens']:,.0f} tokens in {figures['seconds']:,.0f} s | segment {arguments.segment_length} |"
        )
        print("|---|---|")
        print(f"| second tenth | {figures['second_tenth_tokens_per_second']:,.0f} tokens/s |")
        print(f"| last tenth | {figures['last_tenth_tokens_per_second']:,.0f} tokens/s ({drift:+.1%}) |")
        print(f"| peak memory after {WARMUP_TOKENS:,} tokens | {figures['peak_bytes_after_warmup'] / MIB:,.1f} MiB |")
        print(f"| peak memory at the end | {figures['peak_bytes'] / MIB:,.1f} MiB ({growth:+.2%}) |")
        print(f"| state | {figures['state_bytes'] / MIB:.2f} MiB |")
    return 1 if arguments.check and not holds else 0


if __name__ == "__main__":
    sys.exit(main())
