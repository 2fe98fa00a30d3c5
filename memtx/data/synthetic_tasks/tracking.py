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

from memtx.data.synthetic_tasks.base import LabelledSegment, QueryMode, SyntheticTask, sample_distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class StateTracking(SyntheticTask):
    """Tokens: a question for each place, the elements that answer, an exchange for each two places, noise.

    Segment 0 begins with every place and who is there, told as pairs of its question and the answer. A segment that
    asks has its questions, one for each place, behind its exchanges. With two elements it is parity.

    The order told is random, so that without it every answer is as likely as any other, however few exchanges there
    were. Chance says of each exchange whether it takes place: from a number that is known the permutation's sign would
    follow, which of two elements is all there is to know. How often it does is drawn for each episode, from never to
    every second time: in quiet ones what was told can be learned before exchanges are. Who ignores them is right a
    little more often than by chance: of two elements with n possible exchanges, 1 / (2n + 2) more.

    Attributes:
        num_elements: that change places.
        max_swaps: a segment at most; a quarter of them on average.

    Raises:
        MemtxError: they do not fit.
    """

    num_elements: int = 5
    max_swaps: int = 2

    def __post_init__(self) -> None:
        self._check_sizes(max_swaps=self.max_swaps)
        if self.num_elements < 2:
            raise MemtxError(
                f"There are {self.num_elements} elements.", "Give at least 2, so that they can be exchanged."
            )
        if self.max_swaps + 2 * self.num_elements > self.segment_length:
            raise MemtxError(
                f"{self.max_swaps} exchanges behind {self.num_elements} pairs do not fit into {self.segment_length} "
                "tokens.",
                "Give a longer segment.",
            )

    @property
    def swap_pairs(self) -> list[tuple[int, int]]:
        """The two places that each exchange token is about, in the tokens' order."""
        return list(combinations(range(self.num_elements), 2))

    @property
    def num_content_tokens(self) -> int:
        """Questions, elements and exchanges."""
        return 2 * self.num_elements + len(self.swap_pairs)

    @property
    def chance_accuracy(self) -> float:
        """One of the elements."""
        return 1 / self.num_elements

    def _iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, query_mode: QueryMode
    ) -> Iterator[LabelledSegment]:
        state = sample_distinct(batch_size, self.num_elements, self.num_elements, generator)
        often = torch.rand(batch_size, 1, generator=generator) / 2
        for number in range(num_segments):
            tokens, labels = self._noise_segment(batch_size, generator)
            told = 2 * self.num_elements if number == 0 else 0
            room = self.segment_length - (self.num_elements if number else 0)
            at = told + sample_distinct(batch_size, room - told, self.max_swaps, generator).sort(1).values
            if told:
                tokens[:, 0:told:2] = torch.arange(self.num_elements)
                tokens[:, 1:told:2] = self.num_elements + state
            which = torch.randint(len(self.swap_pairs), (batch_size, self.max_swaps), generator=generator)
            there = torch.rand(batch_size, self.max_swaps, generator=generator) < often
            tokens.scatter_(1, at, torch.where(there, 2 * self.num_elements + which, tokens.gather(1, at)))
            state = self._apply_swaps(state, which, there)
            if number > 0 and (query_mode == "later" or number == num_segments - 1):
                places = torch.rand(batch_size, self.num_elements, generator=generator).argsort(1)
                tokens[:, room:] = places
                labels[:, room:] = self.num_elements + state.gather(1, places)
            yield tokens, labels

    def _apply_swaps(self, state: Tensor, swap_indices: Tensor, mask: Tensor) -> Tensor:
        """Return who is where, (batch, num_elements), after those exchanges (batch, n) that are there, in order."""
        swaps = torch.tensor(self.swap_pairs)
        for one, takes_place in zip(swap_indices.unbind(1), mask.unbind(1), strict=True):
            places = swaps[one]  # (batch, 2)
            exchanged = state.scatter(1, places, state.gather(1, places.flip(1)))
            state = torch.where(takes_place[:, None], exchanged, state)
        return state
