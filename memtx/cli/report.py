"""What ``memtx read`` shows: a bar while it reads, a line a part, and what the whole came to."""

from __future__ import annotations

import json
import math
import resource
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from memtx.inference.chapters import Chapters, Section
from memtx.inference.curve import Curve, PositionCurve
from memtx.inference.reader import SegmentResult, StreamReader


def progress_bar() -> Progress | None:
    """Return a bar on stderr for bytes, rate and time left; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    return Progress(
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[rate]:>7,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Or lines meant for a file would land on the terminal.
        redirect_stdout=False,
    )


class Report:
    """The lines printed while reading: one every so many tokens, one a chapter, and the sums for the plot."""

    def __init__(self, every: int, quiet: bool, console: Progress | None) -> None:
        self.every = every
        self.quiet = quiet
        self.console = console
        self.along = Curve()
        self.by_position = PositionCurve()
        self.chapters = Chapters()
        self.stretch = Section()
        self.headed = False

    def add(self, result: SegmentResult) -> None:
        """Count a segment and print the lines that it completes."""
        self.along.add(result.nll)
        self.by_position.add(result.nll)
        for chapter in self.chapters.feed(result):
            self._line(chapter.title or "(before the first chapter)", chapter)
        if not self.every:
            return
        first = 0
        while first < len(result.tokens):
            stop = min(len(result.tokens), first + self.every - self.stretch.tokens)
            self.stretch, first = self.stretch.with_tokens(result, first, stop), stop
            if self.stretch.tokens == self.every:
                self._line(f"tokens {self.stretch.start:,}-{self.stretch.start + self.every:,}", self.stretch)
                self.stretch = Section()

    def finish(self) -> None:
        """Print the last chapter's line, where there are chapters."""
        last = self.chapters.finish()
        if last.title:
            self._line(last.title, last)

    def _line(self, title: str, section: Section) -> None:
        if self.quiet:
            return
        head = "" if self.headed else f"{'part':<44}  {'tokens':>10}  {'bits/byte':>9}  {'nats/token':>10}\n"
        self.headed = True
        title = title if len(title) <= 44 else title[:43] + "…"
        text = (
            f"{head}{title:<44}  {section.tokens:>10,}  {section.bits_per_byte:>9.3f}  "
            f"{section.nll / max(1, section.tokens):>10.3f}\n"
        )
        if self.console is not None and sys.stdout.isatty():
            # Through the progress bar, which would otherwise be drawn over it.
            self.console.console.print(text, end="", markup=False, highlight=False)
        else:
            sys.stdout.write(text)

    def position(self) -> dict[str, Any]:
        """Return where it stands, as JSON can hold it; its arrays are :meth:`tensors`."""
        return {
            "chapters": self.chapters.position(),
            "stretch": vars(self.stretch) | {},
            "width": self.along.width,
            "counts": [self.along.count, self.by_position.count],
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums for the plot."""
        return {
            "along": torch.from_numpy(self.along.sums),
            "by_position": torch.from_numpy(self.by_position.sums),
        }

    def restore(self, position: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`position` and :meth:`tensors`."""
        self.chapters.restore(position["chapters"])
        self.stretch = Section(**position["stretch"])
        self.along.width = int(position["width"])
        self.along.count, self.by_position.count = map(int, position["counts"])
        self.along.sums = tensors["along"].numpy().copy()
        self.by_position.sums = tensors["by_position"].numpy().copy()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: on the device if it has its own memory, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_totals(as_json: bool, reader: StreamReader, rate: float) -> None:
    """Print what the whole book came to, ``rate`` in tokens per second."""
    totals, state_bytes, peak = reader.totals, reader.state.nbytes, peak_memory(reader.device)
    if as_json:
        measured = {
            "nll": totals.nll,
            # Infinity is not JSON.
            "bits_per_byte": _finite(totals.bits_per_byte),
            "word_perplexity": _finite(totals.word_perplexity),
            "tokens": totals.tokens,
            "words": totals.words,
            "bytes": totals.bytes,
            "tokens_per_second": rate,
            "state_bytes": state_bytes,
            "peak_memory_bytes": peak,
        }
        sys.stdout.write(json.dumps(measured) + "\n")
        return
    perplexity = totals.word_perplexity
    sys.stdout.write(
        f"whole: {totals.tokens:,} tokens, {totals.words:,} words, {totals.bytes:,} bytes\n"
        f"  bits per byte      {totals.bits_per_byte:.4f}\n"
        f"  word perplexity    {f'{perplexity:,.2f}' if math.isfinite(perplexity) else 'too large for a float'}\n"
        f"  nats               {totals.nll:,.1f} ({totals.nll / max(1, totals.tokens):.4f} per token)\n"
        f"  speed              {rate:,.0f} tokens/s\n"
        f"  state              {state_bytes / 2**20:.2f} MiB, peak memory {peak / 2**20:,.0f} MiB\n"
    )
