"""Recall across segments: key-value pairs among noise, long noise, then queries for the values of keys.

The answer is never repeated, so beyond its window a model answers only if its memory remembers the first segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import LabelledSegment, Segments, SyntheticTask, sample_distinct
from memtx.errors import MemtxError


@dataclass(frozen=True)
class KeyValueTask(SyntheticTask):
    """Base of tasks of keys and values. Tokens: the query, keys, values, noise. MemtxError if the pairs do not fit.

    Attributes:
        num_pairs: Pairs to remember, and queries in a segment with queries.
        num_keys: Number of different keys.
        num_values: Number of different values.
    """

    num_pairs: int = 4
    num_keys: int = 32
    num_values: int = 32

    QUERY_TOKEN: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._check_sizes(num_pairs=self.num_pairs, num_values=self.num_values)
        if not self.num_pairs <= min(self.num_keys, self.segment_length // 2):
            raise MemtxError(
                f"{self.num_pairs} pairs do not fit into {self.num_keys} keys and a segment of {self.segment_length} "
                "tokens.",
                "Give at least as many keys, and two tokens a pair.",
            )

    @property
    def num_content_tokens(self) -> int:
        """Number of query, key and value tokens."""
        return 1 + self.num_keys + self.num_values

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of guessing a value."""
        return 1 / self.num_values

    def _sample_pairs(self, batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return keys and values, each ``(batch, num_pairs)``; the keys of an episode are distinct."""
        keys = 1 + sample_distinct(batch_size, self.num_keys, self.num_pairs, generator)
        values = torch.randint(self.num_values, (batch_size, self.num_pairs), generator=generator)
        return keys, 1 + self.num_keys + values

    def _pair_segment(
        self, first: Tensor, second: Tensor, generator: Generator, mask: Tensor | None = None
    ) -> LabelledSegment:
        """Return noise without labels, with the pairs of ``(batch, num_pairs)`` tokens in it, each at an even index.

        With a mask, ``(batch, num_pairs)`` bool, only the pairs where it is True.
        """
        batch_size = first.shape[0]
        index = 2 * sample_distinct(batch_size, self.segment_length // 2, self.num_pairs, generator)
        tokens, labels = self._noise_segment(batch_size, generator)
        if mask is not None:
            first = torch.where(mask, first, tokens.gather(1, index))
            second = torch.where(mask, second, tokens.gather(1, index + 1))
        return tokens.scatter(1, index, first).scatter(1, index + 1, second), labels

    def _query_segment(self, keys: Tensor, values: Tensor, generator: Generator) -> LabelledSegment:
        """Return a segment with a query for every key."""
        tokens, _ = self._pair_segment(torch.full_like(keys, self.QUERY_TOKEN), keys, generator)
        # Every key of the segment follows a query: its label is its value.
        is_key = (tokens[..., None] == keys[:, None]) & (tokens > 0)[..., None]
        labels = (is_key * values[:, None]).sum(-1)
        return tokens, labels.masked_fill(~is_key.any(-1), IGNORE_INDEX)

    def _read_segments(
        self, keys: Tensor, values: Tensor, num_segments: int, first_query: int, generator: Generator
    ) -> Segments:
        """Yield the segments after the content: queries or noise."""
        for index in range(self.num_write_segments, num_segments):
            if index >= first_query:
                yield self._query_segment(keys, values, generator)
            else:
                yield self._noise_segment(keys.shape[0], generator)


@dataclass(frozen=True)
class AssociativeRecall(KeyValueTask):
    """T1, associative recall: queries for the pairs of the first segment.

    With more pairs it measures how much a memory holds (T2; multi-query associative recall, Arora et al. 2024, section
    3).
    """

    def _iter_segments(self, batch_size: int, num_segments: int, first_query: int, generator: Generator) -> Segments:
        keys, values = self._sample_pairs(batch_size, generator)
        yield self._pair_segment(keys, values, generator)
        yield from self._read_segments(keys, values, num_segments, first_query, generator)


@dataclass(frozen=True)
class Overwrite(KeyValueTask):
    """T3, overwriting: keys get new values in later segments; queries ask for the newest value, or the first.

    It separates a memory that erases from one that adds up, and from a bank that keeps all values. Every key has a
    value in segment 0 and gets another one in ``num_overwrites`` of the segments after it.

    Attributes:
        num_overwrites: Number of times that a key gets a new value, each in another segment.
        spread: Number of segments with content, including the first.
        query_first: If True, ask for the first value, else for the newest.
    """

    num_overwrites: int = 1
    spread: int = 4
    query_first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_overwrites < self.spread:
            raise MemtxError(
                f"num_overwrites ({self.num_overwrites}) must be from 0 to below spread ({self.spread}).",
                "Give fewer overwrites than segments, since the first segment holds the first values.",
            )

    @property
    def num_write_segments(self) -> int:
        """Number of segments with values."""
        return self.spread

    def _iter_segments(self, batch_size: int, num_segments: int, first_query: int, generator: Generator) -> Segments:
        keys, first_values = self._sample_pairs(batch_size, generator)
        yield self._pair_segment(keys, first_values, generator)
        values = first_values
        # (batch, num_pairs, spread - 1): for every key a random choice of `num_overwrites` segments.
        ranks = torch.rand(batch_size, self.num_pairs, self.spread - 1, generator=generator).argsort(-1)
        for changes in (ranks < self.num_overwrites).unbind(-1):
            values = torch.where(changes, self._sample_other_values(values, generator), values)
            yield self._pair_segment(keys, values, generator, changes)
        answers = first_values if self.query_first else values
        yield from self._read_segments(keys, answers, num_segments, first_query, generator)

    def _sample_other_values(self, values: Tensor, generator: Generator) -> Tensor:
        """Return random values that differ from the given ones, if there are two."""
        start = 1 + self.num_keys
        step = torch.randint(1, max(self.num_values, 2), values.shape, generator=generator)
        return start + (values - start + step) % self.num_values
