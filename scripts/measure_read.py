"""Whether reading stays as fast and as small however much was read: tokens/s and memory along one stream.

    python scripts/measure_read.py [--tokens N] [--checkpoint CKPT] [--root FOLDER] [--plot PNG] [--json] [--check]

Reads through the StreamReader and the report of `memtx read`, books one after the other, again from the first when
they end. Without a checkpoint a small random model is made: speed and memory do not depend on what was learned.
The machine's own speed drifts by more than a tenth in a minute. So the second tenth is read once more, from a fork
of the stream made there, in turn with the last tenth, window by window; the ratio is the median over these pairs.
With --check the exit code is 1 where a bound does not hold: peak memory within 2% of that after the first 50,000
tokens, and the last tenth's speed within 5% of the second tenth's. Run it on a machine with nothing else to do.
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
from numpy.typing import NDArray

from memtx import files
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.cli.read import CHUNK_BYTES
from memtx.cli.report import ReadingReport, peak_memory_bytes
from memtx.data.tokenizers import ByteTokenizer
from memtx.inference.reader import StreamReader
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer

NUM_WINDOWS = 100
"""Stretches that a figure is given for; the second tenth is ten of them."""

WARMUP_TOKENS = 50_000
"""Tokens after which memory may grow no more."""

MEMORY_BOUND, SPEED_BOUND = 0.02, 0.05


def save_small_model(folder: Path) -> Path:
    """Write a random byte-level model, 4 layers of 128, window 256, 128 compressed entries of 4 positions."""
    torch.manual_seed(0)
    memories = [partial(CompressedMemory, window=256, compression_rate=4, num_entries=128)]
    MemoryTransformer(257, dim=128, depth=4, heads=4, memories=memories).save_pretrained(folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    return folder


def repeat_books(root: Path | None) -> Iterator[bytes]:
    """Yield the books in portions, over and over; made-up words where there are no books."""
    books = sorted(root.rglob("*.txt")) if root is not None else []
    if not books:
        words = [f"w{number}" for number in np.random.default_rng(0).integers(0, 5000, 20_000)]
        text = " ".join(words).encode()
        while True:
            yield from (text[place : place + CHUNK_BYTES] for place in range(0, len(text), CHUNK_BYTES))
    while True:
        for book in books:
            with book.open("rb") as handle:
                yield from iter(partial(handle.read, CHUNK_BYTES), b"")


def resident_bytes() -> int:
    """Return what the process holds now; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes(torch.device("cpu"))
    return pages * os.sysconf("SC_PAGE_SIZE")


class Stream:
    """A reader and what it reads, a window at a time."""

    def __init__(self, reader: StreamReader, chunks: Iterator[bytes]) -> None:
        self.reader = reader
        self.report = ReadingReport(10_000, quiet=True)
        self._results = (result for portion in chunks for result in reader.feed(portion))

    def read_until(self, end: int) -> float:
        """Read until ``end`` tokens were read in all; return tokens a second."""
        began, first, read = time.perf_counter(), self.reader.totals.num_tokens, 0
        while read < end:
            result = next(self._results)
            self.report.add(result)
            read = result.end
        return (read - first) / (time.perf_counter() - began)


def measure(reader: StreamReader, tokens: int, root: Path | None) -> dict[str, NDArray[np.float64] | float]:
    """Read ``tokens`` tokens; return the figures of every window and of the whole."""
    tenth = NUM_WINDOWS // 10
    ends = [tokens * (window + 1) // NUM_WINDOWS for window in range(NUM_WINDOWS)]
    rates, resident, again = np.zeros(NUM_WINDOWS), np.zeros(NUM_WINDOWS), np.zeros(tenth)
    settled = 0
    kept: list[bytes] = []
    early: Stream | None = None

    def portions() -> Iterator[bytes]:
        for portion in repeat_books(root):
            if tenth <= window <= 2 * tenth:
                kept.append(portion)  # To be read again.
            yield portion

    window = 0
    began = time.perf_counter()
    late = Stream(reader, portions())
    for window in range(NUM_WINDOWS):
        if window == tenth:
            # The portion in hand is read on by both: the fork begins with the one that follows it.
            early = Stream(reader.fork(), iter(kept))
        rates[window] = late.read_until(ends[window])
        resident[window] = resident_bytes()
        if not settled and ends[window] >= WARMUP_TOKENS:
            settled = peak_memory_bytes(reader.device)
        if window >= NUM_WINDOWS - tenth:
            assert early is not None
            pair = window - (NUM_WINDOWS - tenth)
            again[pair] = early.read_until(ends[tenth + pair])
    return {
        "tokens": reader.totals.num_tokens,
        "seconds": time.perf_counter() - began,
        # Medians of ten windows: one hiccup of the machine is not the program's.
        "second_tenth_tokens_per_second": statistics.median(again),
        "last_tenth_tokens_per_second": statistics.median(rates[-tenth:]),
        "last_to_second_tenth": statistics.median(rates[-tenth:] / again),
        "peak_bytes_after_warmup": settled or peak_memory_bytes(reader.device),
        "peak_bytes": peak_memory_bytes(reader.device),
        "state_bytes": reader.state.nbytes,
        "tokens_per_second": rates,
        "resident_bytes": resident,
    }


def plot_results(path: str, tokens: int, rates: NDArray[np.float64], resident: NDArray[np.float64]) -> None:
    """Draw both figures along the stream, from zero, so that flat looks flat and nothing else does."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
    place = (np.arange(NUM_WINDOWS) + 1) * tokens / NUM_WINDOWS / 1e3
    panels = zip(figure.subplots(1, 2), (("tokens/s", rates), ("resident MiB", resident / 2**20)), strict=True)
    for axes, (name, values) in panels:
        axes.plot(place, values, color="#2b6cb0", linewidth=1.5)
        axes.set_ylim(0, values.max() * 1.15)
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("thousand tokens read", fontsize=9)
        axes.grid(True, color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--checkpoint", help="what to read with; a small random model by default")
    parser.add_argument("--root", type=Path, help="a folder of .txt; by default MEMTX_DATA/pg19-mini or made-up words")
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bound does not hold")
    arguments = parser.parse_args()
    root: Path | None = arguments.root
    if root is None and "MEMTX_DATA" in os.environ:
        root = Path(os.environ["MEMTX_DATA"]) / "pg19-mini"
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model_and_tokenizer(arguments.checkpoint or save_small_model(Path(folder)))
    found = measure(StreamReader(model, tokenizer, arguments.segment_length), arguments.tokens, root)
    rates, resident = np.asarray(found.pop("tokens_per_second")), np.asarray(found.pop("resident_bytes"))
    figures = {name: float(value) for name, value in found.items()}
    growth = figures["peak_bytes"] / figures["peak_bytes_after_warmup"] - 1
    drift = figures["last_to_second_tenth"] - 1
    holds = growth <= MEMORY_BOUND and abs(drift) <= SPEED_BOUND
    if arguments.plot:
        plot_results(arguments.plot, arguments.tokens, rates, resident)
    if arguments.json:
        print(json.dumps({**figures, "memory_growth": growth, "speed_drift": drift, "holds": holds}))
    else:
        print(
            f"| {figures['tokens']:,.0f} tokens in {figures['seconds']:,.0f} s | segment {arguments.segment_length} |"
        )
        print("|---|---|")
        print(f"| second tenth | {figures['second_tenth_tokens_per_second']:,.0f} tokens/s |")
        print(f"| last tenth | {figures['last_tenth_tokens_per_second']:,.0f} tokens/s ({drift:+.1%}) |")
        print(f"| peak memory after {WARMUP_TOKENS:,} tokens | {figures['peak_bytes_after_warmup'] / 2**20:,.1f} MiB |")
        print(f"| peak memory at the end | {figures['peak_bytes'] / 2**20:,.1f} MiB ({growth:+.2%}) |")
        print(f"| state | {figures['state_bytes'] / 2**20:.2f} MiB |")
    return 1 if arguments.check and not holds else 0


if __name__ == "__main__":
    sys.exit(main())
