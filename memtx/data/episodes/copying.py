"""Selective copying: symbols spread over segments of noise, then all of them in order (T4).

After Jing et al. 2019 (denoising task, section 4.2) and Gu and Dao 2023 (section 4.1.1). What is copied is told by the
order of the places that ask, so nothing but the memory says which symbol is next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memtx.data.episodes.base import Ask, Part, Task, distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class Copying(Task):
    """Token 0 asks for the next symbol; then come symbols and noise.

    Attributes:
        count: symbols to be kept.
        symbols: different ones.
        spread: segments that they are spread over.

    Raises:
        MemtxError: the symbols do not fit.
    """

    count: int = 16
    symbols: int = 16
    spread: int = 4

    def __post_init__(self) -> None:
        self._enough(count=self.count, symbols=self.symbols, spread=self.spread)
        if self.count > self.segment:
            raise MemtxError(
                f"{self.count} symbols are to be copied in a segment of {self.segment} tokens.",
                "Give a longer segment or fewer symbols.",
            )

    @property
    def meaning(self) -> int:
        """The question and the symbols."""
        return 1 + self.symbols

    @property
    def chance(self) -> float:
        """One of the symbols."""
        return 1 / self.symbols

    @property
    def written(self) -> int:
        """Those with symbols."""
        return self.spread

    def _episode(self, rows: int, segments: int, generator: torch.Generator, ask: Ask) -> Iterator[Part]:
        places = self.spread * self.segment
        at = distinct(rows, places, self.count, generator).sort(1).values
        wanted = 1 + torch.randint(self.symbols, (rows, self.count), generator=generator)
        for number in range(self.spread):
            tokens, silent = self._quiet(rows, generator)
            here = at - number * self.segment
            inside = (here >= 0) & (here < self.segment)
            # One place more takes what is elsewhere.
            padded = torch.nn.functional.pad(tokens, (0, 1))
            padded.scatter_(1, torch.where(inside, here, self.segment), wanted)
            yield padded[:, : self.segment], silent
        for number in range(self.spread, segments):
            tokens, labels = self._quiet(rows, generator)
            if ask == "later" or number == segments - 1:
                tokens[:, : self.count] = 0
                labels[:, : self.count] = wanted
            yield tokens, labels
