"""State tracking: elements that swap positions all along, and queries for the element at each position (T5).

Looking up tokens does not answer it: every swap counts, in order. Swaps of five elements generate the symmetric group
S5, whose word problem no fixed number of attention layers solves at every length (Merrill et al. 2024, section 3); a
recurrent state can.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Generator, Tensor

from memtx.data.synthetic_tasks.base import Segments, SyntheticTask, sample_distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class StateTracking(SyntheticTask):
    """Tokens: a query for each position, the elements that answer, a swap for each two positions, noise.

    Segment 0 begins with the initial state, a pair of query and answer for each position. A segment with queries has
    one for each position, after its swaps. With two elements the task is parity. Raises MemtxError if they do not fit.

    The initial state is random, so without it every answer is equally likely, however few swaps there were. Each swap
    takes place at random: a known number of swaps would give away the permutation's sign, which for two elements is the
    whole answer. The probability of a swap is drawn for each episode, from 0 to 1/2, so that in quiet episodes recall
    of the initial state can be learned before swaps are. Ignoring swaps is right a little more often than by chance:
    for two elements with n possible swaps, 1 / (2n + 2) more.

    Attributes:
        num_elements: Number of elements.
        max_swaps: Maximum swaps of a segment; a quarter of them on average.
    """

    num_elements: int = 5
    max_swaps: int = 2

    def __post_init__(self) -> None:
        self._check_sizes(max_swaps=self.max_swaps)
        if self.num_elements < 2:
            message = f"num_elements is {self.num_elements}, expected at least 2."
            raise MemtxError(message, "Give at least 2 elements to swap.")
        if self.max_swaps + 2 * self.num_elements > self.segment_length:
            raise MemtxError(
                f"{self.max_swaps} swaps after {self.num_elements} pairs do not fit into segment_length "
                f"({self.segment_length}).",
                "Give a longer segment.",
            )

    @property
    def swap_pairs(self) -> list[tuple[int, int]]:
        """The two positions of each swap, in the order of the swap tokens."""
        return list(combinations(range(self.num_elements), 2))

    @property
    def num_content_tokens(self) -> int:
        """Number of query, element and swap tokens."""
        return 2 * self.num_elements + len(self.swap_pairs)

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of guessing an element."""
        return 1 / self.num_elements

    def _iter_segments(self, batch_size: int, num_segments: int, first_query: int, generator: Generator) -> Segments:
        count = self.num_elements
        state = sample_distinct(batch_size, count, count, generator)
        swap_prob = torch.rand(batch_size, 1, generator=generator) / 2
        for index in range(num_segments):
            tokens, labels = self._noise_segment(batch_size, generator)
            start, stop = (2 * count, self.segment_length) if index == 0 else (0, self.segment_length - count)
            positions = start + sample_distinct(batch_size, stop - start, self.max_swaps, generator).sort(1).values
            if index == 0:
                tokens[:, 0 : 2 * count : 2] = torch.arange(count)
                tokens[:, 1 : 2 * count : 2] = count + state
            swaps = torch.randint(len(self.swap_pairs), (batch_size, self.max_swaps), generator=generator)
            mask = torch.rand(batch_size, self.max_swaps, generator=generator) < swap_prob
            tokens.scatter_(1, positions, torch.where(mask, 2 * count + swaps, tokens.gather(1, positions)))
            state = self._apply_swaps(state, swaps, mask)
            if index >= first_query:
                queries = torch.rand(batch_size, count, generator=generator).argsort(1)
                tokens[:, stop:] = queries
                labels[:, stop:] = count + state.gather(1, queries)
            yield tokens, labels

    def _apply_swaps(self, state: Tensor, swap_indices: Tensor, mask: Tensor) -> Tensor:
        """Return the state ``(batch, num_elements)`` after the swaps ``(batch, n)`` that the mask keeps, in order."""
        swap_pairs = torch.tensor(self.swap_pairs)
        for swap, takes_place in zip(swap_indices.unbind(1), mask.unbind(1), strict=True):
            positions = swap_pairs[swap]  # (batch, 2)
            swapped = state.scatter(1, positions, state.gather(1, positions.flip(1)))
            state = torch.where(takes_place[:, None], swapped, state)
        return state
