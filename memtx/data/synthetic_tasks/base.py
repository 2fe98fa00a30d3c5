"""Base of synthetic tasks: episodes generated segment by segment, with queries far from what answers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.errors import MemtxError, check_at_least

QueryMode = Literal["later", "last"]  # segments with queries: every one after the content, or the last one alone
# Tokens and labels of one segment, each (batch, segment_length) int64; a label is -100 where nothing is asked.
LabelledSegment = tuple[Tensor, Tensor]
Segments = Iterator[LabelledSegment]


@dataclass(frozen=True)
class SyntheticTask(ABC):
    """Sizes of a task, and its generator of episodes. Token 0 is the query.

    Attributes:
        segment_length: Tokens of a segment.
        num_noise_tokens: Number of different noise tokens, the last ones of the vocabulary.
    """

    segment_length: int = 24
    num_noise_tokens: int = 16

    @property
    def num_write_segments(self) -> int:
        """Number of segments with content at the beginning; distances count from the last of them."""
        return 1

    @property
    @abstractmethod
    def num_content_tokens(self) -> int:
        """Number of different tokens that are not noise."""

    @property
    @abstractmethod
    def chance_accuracy(self) -> float:
        """Accuracy of guessing."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.num_content_tokens + self.num_noise_tokens

    def iter_segments(
        self, batch_size: int, num_segments: int, generator: Generator, *, query_mode: QueryMode = "later"
    ) -> Segments:
        """Yield a batch of episodes segment by segment, so their length costs no memory.

        ``num_segments`` must be more than ``num_write_segments``: the difference is the distance. Raises MemtxError for
        too few segments, or an unknown query mode.
        """
        if num_segments <= self.num_write_segments or query_mode not in ("later", "last"):
            message = f"Got {num_segments} segments and query_mode {query_mode!r}."
            raise MemtxError(message, f"Give at least {self.num_write_segments + 1} segments, and 'later' or 'last'.")
        first_query = self.num_write_segments if query_mode == "later" else num_segments - 1
        return self._iter_segments(batch_size, num_segments, first_query, generator)

    @abstractmethod
    def _iter_segments(self, batch_size: int, num_segments: int, first_query: int, generator: Generator) -> Segments:
        """Yield the segments; those from index ``first_query`` on have queries."""

    def _sample_noise(self, batch_size: int, generator: Generator) -> Tensor:
        shape = batch_size, self.segment_length
        return torch.randint(self.num_content_tokens, self.vocab_size, shape, generator=generator)

    def _noise_segment(self, batch_size: int, generator: Generator) -> LabelledSegment:
        """Return a segment of noise without labels."""
        tokens = self._sample_noise(batch_size, generator)
        return tokens, torch.full_like(tokens, IGNORE_INDEX)

    def _check_sizes(self, **sizes: int) -> None:
        """Raise MemtxError for the first size below 1."""
        check_at_least(1, segment_length=self.segment_length, num_noise_tokens=self.num_noise_tokens, **sizes)


def sample_distinct(batch_size: int, limit: int, count: int, generator: Generator) -> Tensor:
    """Return ``(batch, count)`` random numbers below ``limit``, distinct within an episode."""
    return torch.rand(batch_size, limit, generator=generator).argsort(1)[:, :count]
