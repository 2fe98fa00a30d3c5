"""Rows of a task put together into batches: padded, in an order that seed and epoch decide, resumed at a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.offset_tokenizers import Encoded, OffsetTokenizer
from memtx.data.task import Array, Scores, Task, Window
from memtx.errors import CheckpointError

B = TypeVar("B")

POOL = 50
"""Batches whose rows are sorted by length together, so that little is padded."""


class Prepared:
    """An example, its texts as tokens, and its rows. No dataclass, because Lightning looks into those for tensors."""

    def __init__(self, example: Any, encoded: Sequence[Encoded], windows: Sequence[Window]) -> None:
        self.example, self.encoded, self.windows = example, encoded, windows


class Asked:
    """The examples of a batch and their task, to make answers of scores."""

    def __init__(self, task: Task, prepared: Sequence[Prepared]) -> None:
        self.task, self.prepared = task, prepared

    def answers(self, scores: Sequence[Scores]) -> list[dict[str, Any]]:
        """Return an answer an example.

        Args:
            scores: of every row, those of an example one after another, each (outputs,) or (length, outputs).
        """
        said, at = [], 0
        for one in self.prepared:
            own = scores[at : at + len(one.windows)]
            at += len(one.windows)
            said.append(self.task.decide(one.example, one.encoded, one.windows, own))
        return said


class TaskBatch(NamedTuple):
    """Rows of a task.

    Attributes:
        tokens: (rows, length) int64.
        present: (rows, length) int64, 1 for a token and 0 for padding.
        types: (rows, length) int64, 1 for tokens of a second text.
        marked: (rows, length) int64, 1 for global tokens.
        labels: (rows,) classes, (rows, length) tags, or (rows, 2) first and last place of an answer; ``IGNORED`` where
            there is nothing to learn.
        asked: whole examples, where rows are to be answers; None in training.
    """

    tokens: Tensor
    present: Tensor
    types: Tensor
    marked: Tensor
    labels: Tensor
    asked: Asked | None


def prepared(examples: Sequence[Any], task: Task, tokenizer: OffsetTokenizer) -> list[Prepared]:
    """Encode examples.

    Raises:
        DataError: see :meth:`memtx.data.task.Task.windows`.
    """
    texts = [task.texts(example) for example in examples]
    encoded = iter(tokenizer.encode([one for pair in texts for one in pair]))
    made = []
    for example, own in zip(examples, texts, strict=True):
        parts = [next(encoded) for _ in own]
        made.append(Prepared(example, parts, task.windows(example, parts, tokenizer)))
    return made


def collated(windows: Sequence[Window], padding: int, asked: Asked | None = None) -> TaskBatch:
    """Return rows as one batch, padded at the end to the longest."""
    longest = max(len(one.ids) for one in windows)

    def filled(parts: Sequence[Any], value: int) -> Tensor:
        whole = np.full((len(parts), longest), value, dtype=np.int64)
        for row, part in enumerate(parts):
            whole[row, : len(part)] = part
        return torch.from_numpy(whole)

    targets = [one.target if one.target is not None else np.array([IGNORED]) for one in windows]
    if all(len(target) == len(one.ids) for target, one in zip(targets, windows, strict=True)):
        labels = filled(targets, IGNORED)
    else:
        labels = torch.from_numpy(np.stack(targets)).squeeze(-1)
    return TaskBatch(
        filled([one.ids for one in windows], padding),
        filled([np.ones_like(one.ids) for one in windows], 0),
        filled([one.types for one in windows], 0),
        filled([one.marked for one in windows], 0),
        labels,
        asked,
    )


class Sized(Protocol):
    """A row, of which only the length matters here."""

    @property
    def ids(self) -> Array:
        """(length,) tokens."""


class Rows(Protocol):
    """An example as rows."""

    @property
    def windows(self) -> Sequence[Any]:
        """The rows."""


class TrainingBatches(Generic[B]):
    """Endless in passes: every row once a pass, rows of about equal length together; the position is a few integers.

    Resumed with other batches or ranks, it deals what is left of the pass to these. What does not make a batch for each
    rank is left out at a pass's end.

    Args:
        examples: what is learned from.
        rows: of a batch.
        padding: the id that fills up.
        seed: of the order.
        rank: this process.
        world_size: processes; each gets equally many batches.
        collate: makes a batch of rows and padding.
    """

    def __init__(
        self,
        examples: Sequence[Rows],
        rows: int,
        padding: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        collate: Callable[[Sequence[Any], int], B],
    ) -> None:
        self.collate = collate
        self.windows: list[Sized] = [window for one in examples for window in one.windows]
        self.rows, self.padding, self.seed = rows, padding, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        # Earlier batches of this pass: their rows, how many ranks had one at a time, and how many each of them read.
        self._deals: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return _each(-(-len(self.windows) // self.rows), self.world_size)

    def _batches(self, left: Sequence[int], rows: int) -> list[list[int]]:
        """Return batches of the places ``left`` in this pass's order."""
        generator = np.random.default_rng([self.seed, self.epoch])
        mixed = [left[place] for place in generator.permutation(len(left))]
        batches: list[list[int]] = []
        for at in range(0, len(mixed), POOL * rows):
            pool = sorted(mixed[at : at + POOL * rows], key=lambda place: len(self.windows[place].ids))
            batches += [pool[start : start + rows] for start in range(0, len(pool), rows)]
        return [batches[place] for place in generator.permutation(len(batches))]

    def _left(self) -> Sequence[int]:
        """Return the places that earlier batches left of this pass."""
        left: Sequence[int] = range(len(self.windows))
        for rows, ranks, read in self._deals:
            gone = {place for batch in self._batches(left, rows)[: ranks * read] for place in batch}
            left = [place for place in left if place not in gone]
        return left

    def _order(self) -> list[list[int]]:
        """Return this rank's batches of what is left of the pass."""
        batches = self._batches(self._left(), self.rows)
        # Every rank has as many, also where there are fewer batches than ranks.
        return (batches[self.rank :: self.world_size] or batches[:1])[: _each(len(batches), self.world_size)]

    def __iter__(self) -> Iterator[B]:
        if self.position >= len(self):
            # Here, not behind the last batch: who counts batches does not come back to see the end.
            self.epoch, self.position, self._deals = self.epoch + 1, 0, []
        batches = self._order()
        while self.position < len(self):
            # What is left of a pass ends where the pass does.
            chosen = batches[self.position - len(self)]
            # Before it is handed out: a checkpoint written after its step counts it.
            self.position += 1
            yield self.collate([self.windows[place] for place in chosen], self.padding)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is one in."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "rows": self.rows,
            "ranks": self.world_size,
            "deals": [list(one) for one in self._deals],
            "windows": len(self.windows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CheckpointError: it is one in other data.
        """
        own = self.state_dict()
        for key in ("seed", "windows"):
            if state_dict.get(key, own[key]) != own[key]:
                raise CheckpointError(
                    f"The checkpoint's data position belongs to {key} {state_dict[key]}, this run has {own[key]}.",
                    "Resume with the config saved beside the checkpoint and its data.",
                )
        saved = {**own, **state_dict}
        self.epoch, self.position = int(saved["epoch"]), int(saved["position"])
        self._deals = [(rows, ranks, read) for rows, ranks, read in saved["deals"]]
        if (saved["rows"], saved["ranks"]) != (self.rows, self.world_size):
            self._redeal(saved["rows"], saved["ranks"])

    def _redeal(self, rows: int, ranks: int) -> None:
        """Deal what batches of so many rows, on so many ranks, left of the pass to our own."""
        left = len(self._left())
        whole = _each(-(-len(self.windows) // rows), ranks)
        read = self.position - whole + _each(-(-left // rows), ranks)
        self._deals.append((rows, ranks, read))
        more = -(-len(self._left()) // self.rows) // self.world_size
        self.position = len(self) - more
        if not more:
            self._deals = []


def _each(batches: int, ranks: int) -> int:
    """Return how many batches each rank has of so many; one is had by all where there are fewer than ranks."""
    return max(1, batches // ranks)


class ExampleBatches:
    """Every example once, all rows of one in the same batch.

    Args:
        examples: what is measured.
        task: theirs.
        rows: of a batch; more where an example alone has more.
        padding: the id that fills up.
        rank: this process.
        world_size: processes.
    """

    def __init__(
        self,
        examples: Sequence[Prepared],
        task: Task,
        rows: int,
        padding: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.task, self.padding = task, padding
        ordered = sorted(examples[rank::world_size], key=lambda one: max(len(window.ids) for window in one.windows))
        self.batches: list[list[Prepared]] = []
        room = 0
        for one in ordered:
            if room < len(one.windows):
                self.batches.append([])
                room = rows
            self.batches[-1].append(one)
            room -= len(one.windows)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TaskBatch]:
        for batch in self.batches:
            windows = [window for one in batch for window in one.windows]
            yield collated(windows, self.padding, Asked(self.task, batch))
