"""What every drawn task is: episodes that are read segment by segment, and questions far from what answers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.errors import MemtxError

QueryMode = Literal["later", "last"]
"""When questions are asked: in every segment that can have some, as for training, or in the last alone."""

LabelledSegment = tuple[Tensor, Tensor]
"""Tokens and labels of one segment, (batch, segment_length) int64 each; a label is -100 where nothing is asked."""


@dataclass(frozen=True)
class SyntheticTask(ABC):
    """A task's sizes; token 0 asks.

    Attributes:
        segment_length: tokens a segment.
        num_noise_tokens: different tokens that mean nothing; they are the last of the vocabulary.
    """

    segment_length: int = 24
    num_noise_tokens: int = 16

    @property
    def num_write_segments(self) -> int:
        """Segments at the beginning that questions are about; a distance is counted from the last of them."""
        return 1

    @property
    @abstractmethod
    def num_content_tokens(self) -> int:
        """Different tokens that mean something."""

    @property
    @abstractmethod
    def chance_accuracy(self) -> float:
        """The accuracy of guessing."""

    @property
    def vocab_size(self) -> int:
        """Different tokens."""
        return self.num_content_tokens + self.num_noise_tokens

    def iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, *, query_mode: QueryMode = "later"
    ) -> Iterator[LabelledSegment]:
        """Yield an episode segment by segment, so that its length costs no memory.

        Args:
            batch_size: episodes side by side.
            num_segments: more than are written; the distance is what is more.
            generator: of the draw.
            query_mode: when.

        Raises:
            MemtxError: too few segments, or another word for when to ask.
        """
        if num_segments <= self.num_write_segments or query_mode not in ("later", "last"):
            raise MemtxError(
                f"Got {num_segments} segments, asking {query_mode!r}.",
                f"Give at least {self.num_write_segments + 1}, and 'later' or 'last'.",
            )
        return self._iter_segments(batch_size, num_segments, generator, query_mode)

    @abstractmethod
    def _iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, query_mode: QueryMode
    ) -> Iterator[LabelledSegment]:
        """Yield the segments."""

    def _sample_noise(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(
            self.num_content_tokens, self.vocab_size, (batch_size, self.segment_length), generator=generator
        )

    def _noise_segment(self, batch_size: int, generator: torch.Generator) -> LabelledSegment:
        """Return a segment of nothing but noise."""
        tokens = self._sample_noise(batch_size, generator)
        return tokens, torch.full_like(tokens, IGNORE_INDEX)

    def _check_sizes(self, **sizes: int) -> None:
        """Raise unless every size is at least 1."""
        for name, size in {
            "segment_length": self.segment_length,
            "num_noise_tokens": self.num_noise_tokens,
            **sizes,
        }.items():
            if size < 1:
                raise MemtxError(f"{name} is {size}.", "Give at least 1.")


@dataclass(frozen=True)
class KeyValueTask(SyntheticTask):
    """Tasks of keys and values: token 0 asks, then come keys, values and noise.

    Attributes:
        num_pairs: pairs to be remembered, and questions in a segment that asks.
        num_keys: different keys.
        num_values: different values.

    Raises:
        MemtxError: the pairs do not fit.
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
        """The question, keys and values."""
        return 1 + self.num_keys + self.num_values

    @property
    def chance_accuracy(self) -> float:
        """One of the values."""
        return 1 / self.num_values

    def _sample_keys(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return 1 + sample_distinct(batch_size, self.num_keys, self.num_pairs, generator)

    def _sample_values(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return 1 + self.num_keys + torch.randint(self.num_values, (batch_size, self.num_pairs), generator=generator)

    def _scatter_pairs(
        self, first: Tensor, second: Tensor, generator: torch.Generator, mask: Tensor | None = None
    ) -> Tensor:
        """Return noise with pairs of (batch, num_pairs) tokens in it, each at an even place; ``mask`` says which."""
        at = 2 * sample_distinct(first.shape[0], self.segment_length // 2, self.num_pairs, generator)
        tokens = self._sample_noise(first.shape[0], generator)
        if mask is not None:
            first, second = (
                torch.where(mask, one, tokens.gather(1, at + after)) for after, one in enumerate((first, second))
            )
        return tokens.scatter(1, at, first).scatter(1, at + 1, second)

    def _query_segment(self, keys: Tensor, values: Tensor, generator: torch.Generator) -> LabelledSegment:
        """Return a segment that asks for every key."""
        tokens = self._scatter_pairs(torch.full_like(keys, self.QUERY_TOKEN), keys, generator)
        # Every key of the segment is a question's: its label is the value that it has.
        is_key = (tokens[..., None] == keys[:, None]) & (tokens > 0)[..., None]
        labels = (is_key * values[:, None]).sum(-1)
        return tokens, labels.masked_fill(~is_key.any(-1), IGNORE_INDEX)


def sample_distinct(batch_size: int, limit: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw (batch, count) numbers below ``limit``, different within a row."""
    return torch.rand(batch_size, limit, generator=generator).argsort(1)[:, :count]
