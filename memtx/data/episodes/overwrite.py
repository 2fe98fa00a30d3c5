"""Overwriting: keys get new values in later segments, and the newest, or the first, is asked for (T3).

It tells a memory that erases from one that adds up, and from a bank that keeps both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.episodes.base import Ask, Pairs, Part
from memtx.errors import MemtxError


@dataclass(frozen=True)
class Overwrite(Pairs):
    """Every key has a value in segment 0 and gets another one in ``times`` of the segments after it.

    Attributes:
        times: how often a key gets a new value, each time in another segment.
        spread: segments that are written in, the first included.
        first: whether the first value is asked for; else the newest.

    Raises:
        MemtxError: the pairs or the times do not fit.
    """

    times: int = 1
    spread: int = 4
    first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.times < self.spread:
            raise MemtxError(
                f"Keys get a new value {self.times} times in {self.spread} segments.",
                "Give fewer times than segments, for the first one holds the first values.",
            )

    @property
    def written(self) -> int:
        """Those with values."""
        return self.spread

    def _episode(self, rows: int, segments: int, generator: torch.Generator, ask: Ask) -> Iterator[Part]:
        keys, values = self._keys(rows, generator), self._values(rows, generator)
        wanted = values
        silent = torch.full((rows, self.segment), IGNORED)
        yield self._placed(keys, values, generator), silent
        # (rows, pairs, spread - 1): a random choice of ``times`` segments for every key.
        chosen = torch.rand(rows, self.pairs, self.spread - 1, generator=generator).argsort(-1) < self.times
        for change in chosen.unbind(-1):
            values = torch.where(change, self._others(values, generator), values)
            yield self._placed(keys, values, generator, change), silent
        wanted = wanted if self.first else values
        for number in range(self.spread, segments):
            asks = ask == "later" or number == segments - 1
            yield self._asked(keys, wanted, generator) if asks else self._quiet(rows, generator)

    def _others(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Draw values that differ from those given, where there are two."""
        start = 1 + self.keys
        step = torch.randint(1, max(self.values, 2), values.shape, generator=generator)
        return start + (values - start + step) % self.values
