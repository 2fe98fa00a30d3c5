"""Overwriting: keys get new values in later segments, and the newest, or the first, is asked for (T3).

It tells a memory that erases from one that adds up, and from a bank that keeps both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import KeyValueTask, LabelledSegment, QueryMode
from memtx.errors import MemtxError


@dataclass(frozen=True)
class Overwrite(KeyValueTask):
    """Every key has a value in segment 0 and gets another one in ``num_overwrites`` of the segments after it.

    Attributes:
        num_overwrites: how often a key gets a new value, each time in another segment.
        spread: segments that are written in, the first included.
        query_first: whether the first value is asked for; else the newest.

    Raises:
        MemtxError: the pairs or the times do not fit.
    """

    num_overwrites: int = 1
    spread: int = 4
    query_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_overwrites < self.spread:
            raise MemtxError(
                f"Keys get a new value {self.num_overwrites} times in {self.spread} segments.",
                "Give fewer times than segments, for the first one holds the first values.",
            )

    @property
    def num_write_segments(self) -> int:
        """Those with values."""
        return self.spread

    def _iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, query_mode: QueryMode
    ) -> Iterator[LabelledSegment]:
        keys, values = self._sample_keys(batch_size, generator), self._sample_values(batch_size, generator)
        wanted = values
        silent = torch.full((batch_size, self.segment_length), IGNORE_INDEX)
        yield self._scatter_pairs(keys, values, generator), silent
        # (batch, num_pairs, spread - 1): a random choice of ``num_overwrites`` segments for every key.
        chosen = (
            torch.rand(batch_size, self.num_pairs, self.spread - 1, generator=generator).argsort(-1)
            < self.num_overwrites
        )
        for change in chosen.unbind(-1):
            values = torch.where(change, self._sample_other_values(values, generator), values)
            yield self._scatter_pairs(keys, values, generator, change), silent
        wanted = wanted if self.query_first else values
        for number in range(self.spread, num_segments):
            asks = query_mode == "later" or number == num_segments - 1
            yield self._query_segment(keys, wanted, generator) if asks else self._noise_segment(batch_size, generator)

    def _sample_other_values(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Draw values that differ from those given, where there are two."""
        start = 1 + self.num_keys
        step = torch.randint(1, max(self.num_values, 2), values.shape, generator=generator)
        return start + (values - start + step) % self.num_values
