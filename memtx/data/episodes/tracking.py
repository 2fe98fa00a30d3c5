"""State tracking: elements that change places by tokens all along, and "who is where?" (T5).

To look tokens up does not answer it: every exchange counts, in order. Exchanges of five elements make the symmetric
group S5, whose word problem no fixed number of attention layers solves at every length (Merrill et al. 2024, section
3); a recurrent state can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from memtx.data.episodes.base import Ask, Part, Task, distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class Tracking(Task):
    """Tokens: a question for each place, the elements that answer, an exchange for each two places, noise.

    Segment 0 begins with every place and who is there, told as pairs of its question and the answer. A segment that
    asks has its questions, one for each place, behind its exchanges. With two elements it is parity.

    The order told is random, so that without it every answer is as likely as any other, however few exchanges there
    were. Chance says of each exchange whether it takes place: from a number that is known the permutation's sign would
    follow, which of two elements is all there is to know. How often it does is drawn for each episode, from never to
    every second time: in quiet ones what was told can be learned before exchanges are. Who ignores them is right a
    little more often than by chance: of two elements with n possible exchanges, 1 / (2n + 2) more.

    Attributes:
        elements: that change places.
        exchanges: a segment at most; a quarter of them on average.

    Raises:
        MemtxError: they do not fit.
    """

    elements: int = 5
    exchanges: int = 2

    def __post_init__(self) -> None:
        self._enough(exchanges=self.exchanges)
        if self.elements < 2:
            raise MemtxError(f"There are {self.elements} elements.", "Give at least 2, so that they can be exchanged.")
        if self.exchanges + 2 * self.elements > self.segment:
            raise MemtxError(
                f"{self.exchanges} exchanges behind {self.elements} pairs do not fit into {self.segment} tokens.",
                "Give a longer segment.",
            )

    @property
    def swaps(self) -> list[tuple[int, int]]:
        """The two places that each exchange token is about, in the tokens' order."""
        return list(combinations(range(self.elements), 2))

    @property
    def meaning(self) -> int:
        """Questions, elements and exchanges."""
        return 2 * self.elements + len(self.swaps)

    @property
    def chance(self) -> float:
        """One of the elements."""
        return 1 / self.elements

    def _episode(self, rows: int, segments: int, generator: torch.Generator, ask: Ask) -> Iterator[Part]:
        state = distinct(rows, self.elements, self.elements, generator)
        often = torch.rand(rows, 1, generator=generator) / 2
        for number in range(segments):
            tokens, labels = self._quiet(rows, generator)
            told = 2 * self.elements if number == 0 else 0
            room = self.segment - (self.elements if number else 0)
            at = told + distinct(rows, room - told, self.exchanges, generator).sort(1).values
            if told:
                tokens[:, 0:told:2] = torch.arange(self.elements)
                tokens[:, 1:told:2] = self.elements + state
            which = torch.randint(len(self.swaps), (rows, self.exchanges), generator=generator)
            there = torch.rand(rows, self.exchanges, generator=generator) < often
            tokens.scatter_(1, at, torch.where(there, 2 * self.elements + which, tokens.gather(1, at)))
            state = self._after(state, which, there)
            if number > 0 and (ask == "later" or number == segments - 1):
                places = torch.rand(rows, self.elements, generator=generator).argsort(1)
                tokens[:, room:] = places
                labels[:, room:] = self.elements + state.gather(1, places)
            yield tokens, labels

    def _after(self, state: Tensor, which: Tensor, there: Tensor) -> Tensor:
        """Return who is where, (rows, elements), after those exchanges (rows, n) that are there, in order."""
        swaps = torch.tensor(self.swaps)
        for one, takes_place in zip(which.unbind(1), there.unbind(1), strict=True):
            places = swaps[one]  # (rows, 2)
            exchanged = state.scatter(1, places, state.gather(1, places.flip(1)))
            state = torch.where(takes_place[:, None], exchanged, state)
        return state
