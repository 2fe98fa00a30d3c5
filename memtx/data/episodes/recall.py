"""Recall across segments: pairs of a key and a value, long noise, then "? key" (T1, associative recall).

A task that a window alone cannot solve beyond its reach, so it tells whether a memory remembers and for how long.
The first segment holds the pairs at random places among noise; later ones hold noise, and questions where they are
asked. The answer is never in the stream, so it can only come from the first segment. With more pairs it tells how much
a memory holds (T2; multi-query associative recall, Arora et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memtx.data.batch import IGNORED
from memtx.data.episodes.base import Ask, Pairs, Part


@dataclass(frozen=True)
class Recall(Pairs):
    """The pairs of the first segment are asked for."""

    def _episode(self, rows: int, segments: int, generator: torch.Generator, ask: Ask) -> Iterator[Part]:
        keys, values = self._keys(rows, generator), self._values(rows, generator)
        yield self._placed(keys, values, generator), torch.full((rows, self.segment), IGNORED)
        for number in range(1, segments):
            asks = ask == "later" or number == segments - 1
            yield self._asked(keys, values, generator) if asks else self._quiet(rows, generator)
