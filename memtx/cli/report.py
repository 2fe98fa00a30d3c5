"""Report of ``memtx read``: one line per section and chapter, then the totals."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch

from memtx.inference.chapters import BookSection, ChapterSplitter
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.surprisal_curve import PositionSurprisalCurve, SurprisalCurve
from memtx.ops.cpu.malloc import peak_memory_bytes

TITLE_WIDTH = 44


class ReadingReport:
    """Report: a line per chapter and per ``interval`` tokens (0 for none), unless ``quiet``, and the plot's curves."""

    def __init__(self, interval: int, quiet: bool) -> None:
        self.interval, self.quiet = interval, quiet
        self.surprisal_curve, self.position_curve = SurprisalCurve(), PositionSurprisalCurve()
        self.chapters, self.current_section = ChapterSplitter(), BookSection()
        self.header_printed = False

    def add(self, result: SegmentResult) -> None:
        """Add a segment and print the lines that it completes."""
        self.surprisal_curve.add(result.nll)
        self.position_curve.add(result.nll)
        for chapter in self.chapters.feed(result):
            self._print_section(chapter.title or "(before the first chapter)", chapter)
        start = 0
        while self.interval and start < len(result.tokens):
            end = min(len(result.tokens), start + self.interval - self.current_section.num_tokens)
            section, start = self.current_section.with_tokens(result, start, end), end
            if section.num_tokens == self.interval:
                self._print_section(f"tokens {section.start:,}-{section.start + self.interval:,}", section)
                section = BookSection()
            self.current_section = section

    def finish(self) -> None:
        """Print the line of the last chapter, if there are chapters."""
        if (chapter := self.chapters.finish()).title:
            self._print_section(chapter.title, chapter)

    def _print_section(self, title: str, section: BookSection) -> None:
        if self.quiet:
            return
        if not self.header_printed:
            sys.stdout.write(f"{'part':<{TITLE_WIDTH}}  {'tokens':>10}  {'bits/byte':>9}  {'nats/token':>10}\n")
        self.header_printed = True
        title = title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 1] + "…"
        figures = f"{section.bits_per_byte:>9.3f}  {section.nll / max(1, section.num_tokens):>10.3f}"
        sys.stdout.write(f"{title:<{TITLE_WIDTH}}  {section.num_tokens:>10,}  {figures}\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, without its arrays, which :meth:`state_tensors` returns."""
        return {
            "chapters": self.chapters.state_dict(),
            "current_section": vars(self.current_section) | {},
            "bin_width": self.surprisal_curve.bin_width,
            "num_tokens": [self.surprisal_curve.num_tokens, self.position_curve.num_tokens],
        }

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums of the curves."""
        sums = {"surprisal_curve": self.surprisal_curve.sums, "position_curve": self.position_curve.sums}
        return {name: torch.from_numpy(array) for name, array in sums.items()}

    def load_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state from :meth:`state_dict` and :meth:`state_tensors`."""
        self.chapters.load_state_dict(state["chapters"])
        self.current_section = BookSection(**state["current_section"])
        self.surprisal_curve.bin_width = int(state["bin_width"])
        self.surprisal_curve.num_tokens, self.position_curve.num_tokens = map(int, state["num_tokens"])
        self.surprisal_curve.sums = tensors["surprisal_curve"].numpy().copy()
        self.position_curve.sums = tensors["position_curve"].numpy().copy()


def print_totals(as_json: bool, reader: StreamReader, tokens_per_second: float) -> None:
    """Print the totals of the text."""
    totals, state_bytes, peak = reader.totals, reader.state.nbytes, peak_memory_bytes(reader.device)
    if as_json:
        figures = {
            "nll": totals.nll,
            "bits_per_byte": totals.bits_per_byte,
            "bits_per_character": totals.bits_per_character,
            "word_perplexity": totals.word_perplexity,
            "tokens": totals.num_tokens,
            "words": totals.num_words,
            "bytes": totals.num_bytes,
            "tokens_per_second": tokens_per_second,
            "state_bytes": state_bytes,
            "peak_memory_bytes": peak,
        }
        # JSON has no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        sys.stdout.write(json.dumps(finite) + "\n")
        return
    perplexity = totals.word_perplexity
    words = f"  word perplexity    {perplexity:,.2f}\n" if math.isfinite(perplexity) else ""
    sys.stdout.write(
        f"total: {totals.num_tokens:,} tokens, {totals.num_words:,} words, {totals.num_bytes:,} bytes\n"
        f"  bits per byte      {totals.bits_per_byte:.4f}\n"
        f"  bits per character {totals.bits_per_character:.4f}\n{words}"
        f"  nats               {totals.nll:,.1f} ({totals.nll / max(1, totals.num_tokens):.4f} per token)\n"
        f"  speed              {tokens_per_second:,.0f} tokens/s\n"
        f"  state              {state_bytes / 2**20:.2f} MiB, peak memory {peak / 2**20:,.0f} MiB\n"
    )
