"""Recall across segments: pairs of a key and a value, long noise, then "? key" (T1, associative recall).

A task that a window alone cannot solve beyond its reach, so it tells whether a memory remembers and for how long.
The first segment holds the pairs at random places among noise; later ones hold noise, and questions where they are
asked. The answer is never in the stream, so it can only come from the first segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.ops.cross_entropy import IGNORED
from memtx.state import MemoryState


class Model(Protocol):
    """What reads a stream with a state, such as :class:`memtx.MemoryTransformer`."""

    def __call__(self, tokens: Tensor, state: MemoryState | None = None) -> Any:
        """Read (rows, segment); ``logits`` and ``state`` of what it returns are used."""
        ...


@dataclass(frozen=True)
class Recall:
    """The task's sizes; token 0 asks, then come keys, values and noise.

    Attributes:
        segment: tokens a segment.
        pairs: pairs to be remembered, and questions in a segment that asks.
        keys: different keys.
        values: different values.
        noise: different noise tokens.

    Raises:
        MemtxError: the pairs do not fit.
    """

    segment: int = 24
    pairs: int = 4
    keys: int = 32
    values: int = 32
    noise: int = 16

    def __post_init__(self) -> None:
        if min(self.pairs, self.values, self.noise) < 1:
            raise MemtxError(
                f"There are {self.pairs} pairs, {self.values} values, {self.noise} noise tokens.", "Use 1."
            )
        if not self.pairs <= min(self.keys, self.segment // 2):
            raise MemtxError(
                f"{self.pairs} pairs do not fit into {self.keys} keys and a segment of {self.segment} tokens.",
                "Give at least as many keys, and two tokens a pair.",
            )

    @property
    def vocab_size(self) -> int:
        """Different tokens."""
        return 1 + self.keys + self.values + self.noise

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.values

    def episodes(
        self, rows: int, segments: int, generator: torch.Generator, *, ask: str = "later"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an episode segment by segment, so that its length costs no memory.

        Args:
            rows: episodes side by side.
            segments: at least 2; the distance is one less.
            generator: of the draw.
            ask: "later" for questions in every segment but the first, as for training; "last" for the last alone.

        Returns:
            tokens and labels, (rows, segment) int64 each: the value at each question's key, -100 elsewhere.

        Raises:
            MemtxError: fewer than two segments, or another word for when to ask.
        """
        if segments < 2 or ask not in ("later", "last"):
            raise MemtxError(f"Got {segments} segments, asking {ask!r}.", "Give at least 2, and 'later' or 'last'.")
        keys = 1 + _distinct(rows, self.keys, self.pairs, generator)
        values = 1 + self.keys + torch.randint(self.values, (rows, self.pairs), generator=generator)
        yield self._placed(keys, values, generator), torch.full((rows, self.segment), IGNORED)
        for number in range(1, segments):
            asks = ask == "later" or number == segments - 1
            yield self._asked(keys, values, generator) if asks else self._quiet(rows, generator)

    def _noise(self, rows: int, generator: torch.Generator) -> Tensor:
        first = 1 + self.keys + self.values
        return torch.randint(first, self.vocab_size, (rows, self.segment), generator=generator)

    def _quiet(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._noise(rows, generator)
        return tokens, torch.full_like(tokens, IGNORED)

    def _placed(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise with pairs of (rows, pairs) tokens in it, each at an even place."""
        at = 2 * _distinct(first.shape[0], self.segment // 2, self.pairs, generator)
        return self._noise(first.shape[0], generator).scatter(1, at, first).scatter(1, at + 1, second)

    def _asked(self, keys: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = self._placed(torch.zeros_like(keys), keys, generator)
        # Every key of the segment is a question's: its label is the value that it had.
        is_key = (tokens[..., None] == keys[:, None]) & (tokens > 0)[..., None]
        labels = (is_key * values[:, None]).sum(-1)
        return tokens, labels.masked_fill(~is_key.any(-1), IGNORED)


def _distinct(rows: int, limit: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw (rows, count) numbers below ``limit``, different within a row."""
    return torch.rand(rows, limit, generator=generator).argsort(1)[:, :count]


@torch.no_grad()
def accuracy(model: Model, task: Recall, distance: int, *, rows: int = 32, seed: int = 0, call: int = 32) -> float:
    """Return the share of questions answered exactly, ``distance`` segments after the pairs.

    Args:
        model: in eval mode, on the CPU or wherever its state puts it; how a stream is cut must not matter to it,
            or ``call`` must be 1.
        task: the task.
        distance: segments from the pairs to the questions, at least 1.
        rows: episodes; each asks ``task.pairs`` questions.
        seed: of the episodes.
        call: segments a call.
    """
    generator = torch.Generator().manual_seed(seed)
    state: MemoryState | None = None
    waiting: list[Tensor] = []
    right = asked = 0
    for number, (tokens, labels) in enumerate(task.episodes(rows, distance + 1, generator, ask="last")):
        waiting.append(tokens)
        if len(waiting) < call and number < distance:
            continue
        device = state.position.device if state is not None else None
        found = model(torch.cat(waiting, dim=1).to(device), state)
        state, waiting = found.state, []
        if number == distance:
            scored = labels != IGNORED
            told = found.logits[:, -task.segment :].argmax(-1).cpu()
            right, asked = int((told == labels)[scored].sum()), int(scored.sum())
    return right / asked
