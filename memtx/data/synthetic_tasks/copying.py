"""Selective copying: symbols spread over segments of noise, then all of them in order (T4).

After Jing et al. 2019 (denoising task, section 4.2) and Gu and Dao 2023 (section 4.1.1). What is copied is told by the
order of the places that ask, so nothing but the memory says which symbol is next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memtx.data.synthetic_tasks.base import LabelledSegment, QueryMode, SyntheticTask, sample_distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """Token 0 asks for the next symbol; then come symbols and noise.

    Attributes:
        num_copied: symbols to be kept.
        num_symbols: different ones.
        spread: segments that they are spread over.

    Raises:
        MemtxError: the symbols do not fit.
    """

    num_copied: int = 16
    num_symbols: int = 16
    spread: int = 4

    def __post_init__(self) -> None:
        self._check_sizes(num_copied=self.num_copied, num_symbols=self.num_symbols, spread=self.spread)
        if self.num_copied > self.segment_length:
            raise MemtxError(
                f"{self.num_copied} symbols are to be copied in a segment of {self.segment_length} tokens.",
                "Give a longer segment or fewer symbols.",
            )

    @property
    def num_content_tokens(self) -> int:
        """The question and the symbols."""
        return 1 + self.num_symbols

    @property
    def chance_accuracy(self) -> float:
        """One of the symbols."""
        return 1 / self.num_symbols

    @property
    def num_write_segments(self) -> int:
        """Those with symbols."""
        return self.spread

    def _iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, query_mode: QueryMode
    ) -> Iterator[LabelledSegment]:
        places = self.spread * self.segment_length
        at = sample_distinct(batch_size, places, self.num_copied, generator).sort(1).values
        wanted = 1 + torch.randint(self.num_symbols, (batch_size, self.num_copied), generator=generator)
        for number in range(self.spread):
            tokens, silent = self._noise_segment(batch_size, generator)
            here = at - number * self.segment_length
            inside = (here >= 0) & (here < self.segment_length)
            # One place more takes what is elsewhere.
            padded = torch.nn.functional.pad(tokens, (0, 1))
            padded.scatter_(1, torch.where(inside, here, self.segment_length), wanted)
            yield padded[:, : self.segment_length], silent
        for number in range(self.spread, num_segments):
            tokens, labels = self._noise_segment(batch_size, generator)
            if query_mode == "later" or number == num_segments - 1:
                tokens[:, : self.num_copied] = 0
                labels[:, : self.num_copied] = wanted
            yield tokens, labels
