"""Rows of a task put together into batches: padded, in an order that seed and epoch decide, resumed at a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, IntArray, Logits, Task
from memtx.errors import CheckpointError

B = TypeVar("B")

SORT_POOL_BATCHES = 50
"""Batches whose rows are sorted by length together, so that little is padded."""


class PreparedExample:
    """An example, its texts as tokens, and its rows. No dataclass, because Lightning looks into those for tensors."""

    def __init__(self, example: Any, encodings: Sequence[Encoding], windows: Sequence[EncodedExample]) -> None:
        self.example, self.encodings, self.windows = example, encodings, windows


class BatchExamples:
    """The examples of a batch and their task, to make answers of scores."""

    def __init__(self, task: Task, examples: Sequence[PreparedExample]) -> None:
        self.task, self.examples = task, examples

    def postprocess(self, logits: Sequence[Logits]) -> list[dict[str, Any]]:
        """Return an answer an example.

        Args:
            logits: of every row, those of an example one after another, each (num_labels,) or (length, num_labels).
        """
        said, at = [], 0
        for one in self.examples:
            own = logits[at : at + len(one.windows)]
            at += len(one.windows)
            said.append(self.task.postprocess(one.example, one.encodings, one.windows, own))
        return said


class TaskBatch(NamedTuple):
    """Rows of a task.

    Attributes:
        tokens: (batch, length) int64.
        attention_mask: (batch, length) int64, 1 for a token and 0 for padding.
        token_type_ids: (batch, length) int64, 1 for tokens of a second text.
        global_attention_mask: (batch, length) int64, 1 for global tokens.
        labels: (batch,) classes, (batch, length) tags, or (batch, 2) first and last place of an answer;
            ``IGNORE_INDEX`` where there is nothing to learn.
        batch_examples: whole examples, where rows are to be answers; None in training.
    """

    tokens: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    global_attention_mask: Tensor
    labels: Tensor
    batch_examples: BatchExamples | None


def encode_examples(examples: Sequence[Any], task: Task, tokenizer: HFTokenizer) -> list[PreparedExample]:
    """Encode examples.

    Raises:
        DataError: see :meth:`memtx.data.tasks.base.Task.encode`.
    """
    texts = [task.get_texts(example) for example in examples]
    encoded = iter(tokenizer.encode([one for pair in texts for one in pair]))
    made = []
    for example, own in zip(examples, texts, strict=True):
        parts = [next(encoded) for _ in own]
        made.append(PreparedExample(example, parts, task.encode(example, parts, tokenizer)))
    return made


def collate(
    windows: Sequence[EncodedExample], pad_token_id: int, batch_examples: BatchExamples | None = None
) -> TaskBatch:
    """Return rows as one batch, padded at the end to the longest."""
    longest = max(len(one.ids) for one in windows)

    def filled(parts: Sequence[Any], value: int) -> Tensor:
        whole = np.full((len(parts), longest), value, dtype=np.int64)
        for row, part in enumerate(parts):
            whole[row, : len(part)] = part
        return torch.from_numpy(whole)

    targets = [one.target if one.target is not None else np.array([IGNORE_INDEX]) for one in windows]
    if all(len(target) == len(one.ids) for target, one in zip(targets, windows, strict=True)):
        labels = filled(targets, IGNORE_INDEX)
    else:
        labels = torch.from_numpy(np.stack(targets)).squeeze(-1)
    return TaskBatch(
        filled([one.ids for one in windows], pad_token_id),
        filled([np.ones_like(one.ids) for one in windows], 0),
        filled([one.token_type_ids for one in windows], 0),
        filled([one.global_attention_mask for one in windows], 0),
        labels,
        batch_examples,
    )


class HasTokenIds(Protocol):
    """A row, of which only the length matters here."""

    @property
    def ids(self) -> IntArray:
        """(length,) tokens."""


class HasWindows(Protocol):
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
        batch_size: of a batch.
        pad_token_id: the id that fills up.
        seed: of the order.
        rank: this process.
        world_size: processes; each gets equally many batches.
        collate_fn: makes a batch of rows and padding.
    """

    def __init__(
        self,
        examples: Sequence[HasWindows],
        batch_size: int,
        pad_token_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        collate_fn: Callable[[Sequence[Any], int], B],
    ) -> None:
        self.collate_fn = collate_fn
        self.windows: list[HasTokenIds] = [window for one in examples for window in one.windows]
        self.batch_size, self.pad_token_id, self.seed = batch_size, pad_token_id, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        # Earlier batches of this pass: their rows, how many ranks had one at a time, and how many each of them read.
        self._assignments: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return _batches_per_rank(-(-len(self.windows) // self.batch_size), self.world_size)

    def _make_batches(self, indices: Sequence[int], batch_size: int) -> list[list[int]]:
        """Return batches of the places ``indices`` in this pass's order."""
        generator = np.random.default_rng([self.seed, self.epoch])
        mixed = [indices[place] for place in generator.permutation(len(indices))]
        batches: list[list[int]] = []
        for at in range(0, len(mixed), SORT_POOL_BATCHES * batch_size):
            pool = sorted(
                mixed[at : at + SORT_POOL_BATCHES * batch_size], key=lambda place: len(self.windows[place].ids)
            )
            batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        return [batches[place] for place in generator.permutation(len(batches))]

    def _remaining(self) -> Sequence[int]:
        """Return the places that earlier batches left of this pass."""
        left: Sequence[int] = range(len(self.windows))
        for rows, ranks, read in self._assignments:
            gone = {place for batch in self._make_batches(left, rows)[: ranks * read] for place in batch}
            left = [place for place in left if place not in gone]
        return left

    def _rank_batches(self) -> list[list[int]]:
        """Return this rank's batches of what is left of the pass."""
        batches = self._make_batches(self._remaining(), self.batch_size)
        # Every rank has as many, also where there are fewer batches than ranks.
        return (batches[self.rank :: self.world_size] or batches[:1])[
            : _batches_per_rank(len(batches), self.world_size)
        ]

    def __iter__(self) -> Iterator[B]:
        if self.position >= len(self):
            # Here, not behind the last batch: who counts batches does not come back to see the end.
            self.epoch, self.position, self._assignments = self.epoch + 1, 0, []
        batches = self._rank_batches()
        while self.position < len(self):
            # What is left of a pass ends where the pass does.
            chosen = batches[self.position - len(self)]
            # Before it is handed out: a checkpoint written after its step counts it.
            self.position += 1
            yield self.collate_fn([self.windows[place] for place in chosen], self.pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is one in."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "assignments": [list(one) for one in self._assignments],
            "num_windows": len(self.windows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CheckpointError: it is one in other data.
        """
        own = self.state_dict()
        for key in ("seed", "num_windows"):
            if state_dict.get(key, own[key]) != own[key]:
                raise CheckpointError(
                    f"The checkpoint's data position belongs to {key} {state_dict[key]}, this run has {own[key]}.",
                    "Resume with the config saved beside the checkpoint and its data.",
                )
        saved = {**own, **state_dict}
        self.epoch, self.position = int(saved["epoch"]), int(saved["position"])
        self._assignments = [(rows, ranks, read) for rows, ranks, read in saved["assignments"]]
        if (saved["batch_size"], saved["world_size"]) != (self.batch_size, self.world_size):
            self._reassign(saved["batch_size"], saved["world_size"])

    def _reassign(self, batch_size: int, world_size: int) -> None:
        """Deal what batches of so many rows, on so many ranks, left of the pass to our own."""
        left = len(self._remaining())
        whole = _batches_per_rank(-(-len(self.windows) // batch_size), world_size)
        read = self.position - whole + _batches_per_rank(-(-left // batch_size), world_size)
        self._assignments.append((batch_size, world_size, read))
        more = -(-len(self._remaining()) // self.batch_size) // self.world_size
        self.position = len(self) - more
        if not more:
            self._assignments = []


def _batches_per_rank(num_batches: int, world_size: int) -> int:
    """Return how many batches each rank has of so many; one is had by all where there are fewer than ranks."""
    return max(1, num_batches // world_size)


class EvaluationBatches:
    """Every example once, all rows of one in the same batch.

    Args:
        examples: what is measured.
        task: theirs.
        batch_size: of a batch; more where an example alone has more.
        pad_token_id: the id that fills up.
        rank: this process.
        world_size: processes.
    """

    def __init__(
        self,
        examples: Sequence[PreparedExample],
        task: Task,
        batch_size: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.task, self.pad_token_id = task, pad_token_id
        ordered = sorted(examples[rank::world_size], key=lambda one: max(len(window.ids) for window in one.windows))
        self.batches: list[list[PreparedExample]] = []
        room = 0
        for one in ordered:
            if room < len(one.windows):
                self.batches.append([])
                room = batch_size
            self.batches[-1].append(one)
            room -= len(one.windows)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[TaskBatch]:
        for batch in self.batches:
            windows = [window for one in batch for window in one.windows]
            yield collate(windows, self.pad_token_id, BatchExamples(self.task, batch))
