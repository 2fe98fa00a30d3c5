"""Selective copying: symbols spread over segments of noise, then all of them in order (T4).

After Jing et al. 2019 (denoising task, section 4.2) and Gu and Dao 2023 (section 4.1.1). The answers follow from the
order of the queries, so only the memory tells which symbol is next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from memtx.data.synthetic_tasks.base import Segments, SyntheticTask, sample_distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """Tokens: the query for the next symbol, symbols, noise. Raises MemtxError if the symbols do not fit.

    Attributes:
        num_copied: Number of symbols to copy.
        num_symbols: Number of different symbols.
        spread: Number of segments with symbols.
    """

    num_copied: int = 16
    num_symbols: int = 16
    spread: int = 4

    def __post_init__(self) -> None:
        self._check_sizes(num_copied=self.num_copied, num_symbols=self.num_symbols, spread=self.spread)
        if self.num_copied > self.segment_length:
            message = f"num_copied ({self.num_copied}) must be at most segment_length ({self.segment_length})."
            raise MemtxError(message, "Give a longer segment or fewer symbols.")

    @property
    def num_content_tokens(self) -> int:
        """Number of query and symbol tokens."""
        return 1 + self.num_symbols

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of guessing a symbol."""
        return 1 / self.num_symbols

    @property
    def num_write_segments(self) -> int:
        """Number of segments with symbols."""
        return self.spread

    def _iter_segments(self, batch_size: int, num_segments: int, first_query: int, generator: Generator) -> Segments:
        num_positions = self.spread * self.segment_length
        positions = sample_distinct(batch_size, num_positions, self.num_copied, generator).sort(1).values
        symbols = 1 + torch.randint(self.num_symbols, (batch_size, self.num_copied), generator=generator)
        for index in range(num_segments):
            tokens, labels = self._noise_segment(batch_size, generator)
            if index < self.spread:
                relative = positions - index * self.segment_length
                inside = (relative >= 0) & (relative < self.segment_length)
                # One extra column takes the symbols of other segments.
                padded = torch.nn.functional.pad(tokens, (0, 1))
                padded.scatter_(1, torch.where(inside, relative, self.segment_length), symbols)
                tokens = padded[:, : self.segment_length]
            elif index >= first_query:
                tokens[:, : self.num_copied] = 0
                labels[:, : self.num_copied] = symbols
            yield tokens, labels
