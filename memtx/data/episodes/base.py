"""What every drawn task is: episodes that are read segment by segment, and questions far from what answers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.errors import MemtxError

Ask = Literal["later", "last"]
"""When questions are asked: in every segment that can have some, as for training, or in the last alone."""

Part = tuple[Tensor, Tensor]
"""Tokens and labels of one segment, (rows, segment) int64 each; a label is -100 where nothing is asked."""


@dataclass(frozen=True)
class Task(ABC):
    """A task's sizes; token 0 asks.

    Attributes:
        segment: tokens a segment.
        noise: different tokens that mean nothing; they are the last of the vocabulary.
    """

    segment: int = 24
    noise: int = 16

    @property
    def written(self) -> int:
        """Segments at the beginning that questions are about; a distance is counted from the last of them."""
        return 1

    @property
    @abstractmethod
    def meaning(self) -> int:
        """Different tokens that mean something."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing."""

    @property
    def vocab_size(self) -> int:
        """Different tokens."""
        return self.meaning + self.noise

    def episodes(self, rows: int, segments: int, generator: torch.Generator, *, ask: Ask = "later") -> Iterator[Part]:
        """Yield an episode segment by segment, so that its length costs no memory.

        Args:
            rows: episodes side by side.
            segments: more than are written; the distance is what is more.
            generator: of the draw.
            ask: when.

        Raises:
            MemtxError: too few segments, or another word for when to ask.
        """
        if segments <= self.written or ask not in ("later", "last"):
            raise MemtxError(
                f"Got {segments} segments, asking {ask!r}.", f"Give at least {self.written + 1}, and 'later' or 'last'."
            )
        return self._episode(rows, segments, generator, ask)

    @abstractmethod
    def _episode(self, rows: int, segments: int, generator: torch.Generator, ask: Ask) -> Iterator[Part]:
        """Yield the segments."""

    def _noise(self, rows: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.meaning, self.vocab_size, (rows, self.segment), generator=generator)

    def _quiet(self, rows: int, generator: torch.Generator) -> Part:
        """Return a segment of nothing but noise."""
        tokens = self._noise(rows, generator)
        return tokens, torch.full_like(tokens, IGNORED)

    def _enough(self, **sizes: int) -> None:
        """Raise unless every size is at least 1."""
        for name, size in {"segment": self.segment, "noise": self.noise, **sizes}.items():
            if size < 1:
                raise MemtxError(f"{name} is {size}.", "Give at least 1.")


@dataclass(frozen=True)
class Pairs(Task):
    """Tasks of keys and values: token 0 asks, then come keys, values and noise.

    Attributes:
        pairs: pairs to be remembered, and questions in a segment that asks.
        keys: different keys.
        values: different values.

    Raises:
        MemtxError: the pairs do not fit.
    """

    pairs: int = 4
    keys: int = 32
    values: int = 32

    ASK: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self._enough(pairs=self.pairs, values=self.values)
        if not self.pairs <= min(self.keys, self.segment // 2):
            raise MemtxError(
                f"{self.pairs} pairs do not fit into {self.keys} keys and a segment of {self.segment} tokens.",
                "Give at least as many keys, and two tokens a pair.",
            )

    @property
    def meaning(self) -> int:
        """The question, keys and values."""
        return 1 + self.keys + self.values

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.values

    def _keys(self, rows: int, generator: torch.Generator) -> Tensor:
        return 1 + distinct(rows, self.keys, self.pairs, generator)

    def _values(self, rows: int, generator: torch.Generator) -> Tensor:
        return 1 + self.keys + torch.randint(self.values, (rows, self.pairs), generator=generator)

    def _placed(self, first: Tensor, second: Tensor, generator: torch.Generator, there: Tensor | None = None) -> Tensor:
        """Return noise with pairs of (rows, pairs) tokens in it, each at an even place; ``there`` says which."""
        at = 2 * distinct(first.shape[0], self.segment // 2, self.pairs, generator)
        tokens = self._noise(first.shape[0], generator)
        if there is not None:
            first, second = (
                torch.where(there, one, tokens.gather(1, at + after)) for after, one in enumerate((first, second))
            )
        return tokens.scatter(1, at, first).scatter(1, at + 1, second)

    def _asked(self, keys: Tensor, values: Tensor, generator: torch.Generator) -> Part:
        """Return a segment that asks for every key."""
        tokens = self._placed(torch.full_like(keys, self.ASK), keys, generator)
        # Every key of the segment is a question's: its label is the value that it has.
        is_key = (tokens[..., None] == keys[:, None]) & (tokens > 0)[..., None]
        labels = (is_key * values[:, None]).sum(-1)
        return tokens, labels.masked_fill(~is_key.any(-1), IGNORED)


def distinct(rows: int, limit: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw (rows, count) numbers below ``limit``, different within a row."""
    return torch.rand(rows, limit, generator=generator).argsort(1)[:, :count]
