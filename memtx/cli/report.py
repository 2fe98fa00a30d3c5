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

from memtx.inference.chapters import ChapterSplitter, Section
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.surprisal_curve import PositionSurprisalCurve, SurprisalCurve


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


class ReadingReport:
    """The lines printed while reading: one every so many tokens, one a chapter, and the sums for the plot."""

    def __init__(self, interval: int, quiet: bool, progress: Progress | None) -> None:
        self.interval = interval
        self.quiet = quiet
        self.progress = progress
        self.surprisal_curve = SurprisalCurve()
        self.position_curve = PositionSurprisalCurve()
        self.chapters = ChapterSplitter()
        self.current_section = Section()
        self.header_printed = False

    def add(self, result: SegmentResult) -> None:
        """Count a segment and print the lines that it completes."""
        self.surprisal_curve.add(result.nll)
        self.position_curve.add(result.nll)
        for chapter in self.chapters.feed(result):
            self._print_section(chapter.title or "(before the first chapter)", chapter)
        if not self.interval:
            return
        first = 0
        while first < len(result.tokens):
            stop = min(len(result.tokens), first + self.interval - self.current_section.num_tokens)
            self.current_section, first = self.current_section.with_tokens(result, first, stop), stop
            if self.current_section.num_tokens == self.interval:
                self._print_section(
                    f"tokens {self.current_section.start:,}-{self.current_section.start + self.interval:,}",
                    self.current_section,
                )
                self.current_section = Section()

    def finish(self) -> None:
        """Print the last chapter's line, where there are chapters."""
        last = self.chapters.finish()
        if last.title:
            self._print_section(last.title, last)

    def _print_section(self, title: str, section: Section) -> None:
        if self.quiet:
            return
        head = "" if self.header_printed else f"{'part':<44}  {'tokens':>10}  {'bits/byte':>9}  {'nats/token':>10}\n"
        self.header_printed = True
        title = title if len(title) <= 44 else title[:43] + "…"
        text = (
            f"{head}{title:<44}  {section.num_tokens:>10,}  {section.bits_per_byte:>9.3f}  "
            f"{section.nll / max(1, section.num_tokens):>10.3f}\n"
        )
        if self.progress is not None and sys.stdout.isatty():
            # Through the progress bar, which would otherwise be drawn over it.
            self.progress.console.print(text, end="", markup=False, highlight=False)
        else:
            sys.stdout.write(text)

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands, as JSON can hold it; its arrays are :meth:`state_tensors`."""
        return {
            "chapters": self.chapters.state_dict(),
            "current_section": vars(self.current_section) | {},
            "bin_width": self.surprisal_curve.bin_width,
            "num_tokens": [self.surprisal_curve.num_tokens, self.position_curve.num_tokens],
        }

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums for the plot."""
        return {
            "surprisal_curve": torch.from_numpy(self.surprisal_curve.sums),
            "position_curve": torch.from_numpy(self.position_curve.sums),
        }

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict` and :meth:`state_tensors`."""
        self.chapters.load_state_dict(state["chapters"])
        self.current_section = Section(**state["current_section"])
        self.surprisal_curve.bin_width = int(state["bin_width"])
        self.surprisal_curve.num_tokens, self.position_curve.num_tokens = map(int, state["num_tokens"])
        self.surprisal_curve.sums = tensors["surprisal_curve"].numpy().copy()
        self.position_curve.sums = tensors["position_curve"].numpy().copy()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes this process has held: on the device if it has its own memory, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_totals(as_json: bool, reader: StreamReader, tokens_per_second: float) -> None:
    """Print what the whole book came to, ``tokens_per_second`` in tokens per second."""
    totals, state_bytes, peak = reader.totals, reader.state.nbytes, peak_memory_bytes(reader.device)
    if as_json:
        measured = {
            "nll": totals.nll,
            # Infinity is not JSON.
            "bits_per_byte": _finite_or_none(totals.bits_per_byte),
            "word_perplexity": _finite_or_none(totals.word_perplexity),
            "tokens": totals.num_tokens,
            "words": totals.num_words,
            "bytes": totals.num_bytes,
            "tokens_per_second": tokens_per_second,
            "state_bytes": state_bytes,
            "peak_memory_bytes": peak,
        }
        sys.stdout.write(json.dumps(measured) + "\n")
        return
    perplexity = totals.word_perplexity
    sys.stdout.write(
        f"whole: {totals.num_tokens:,} tokens, {totals.num_words:,} words, {totals.num_bytes:,} bytes\n"
        f"  bits per byte      {totals.bits_per_byte:.4f}\n"
        f"  word perplexity    {f'{perplexity:,.2f}' if math.isfinite(perplexity) else 'too large for a float'}\n"
        f"  nats               {totals.nll:,.1f} ({totals.nll / max(1, totals.num_tokens):.4f} per token)\n"
        f"  speed              {tokens_per_second:,.0f} tokens/s\n"
        f"  state              {state_bytes / 2**20:.2f} MiB, peak memory {peak / 2**20:,.0f} MiB\n"
    )
