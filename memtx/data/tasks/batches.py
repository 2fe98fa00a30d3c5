"""Batches of task windows: padded, in an order set by seed and epoch, resumable at a position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memtx.data.batch import IGNORE_INDEX, FixedBatches
from memtx.data.tasks.base import NO_TARGET, EncodedExample, Logits, PreparedExample, Task
from memtx.errors import CheckpointError

B = TypeVar("B")

SORT_POOL_BATCHES = 50  # whose windows are sorted by length together, to reduce padding


class BatchExamples:
    """Examples of a batch, to turn logits into predictions. No dataclass: Lightning looks into those for tensors."""

    def __init__(self, task: Task, examples: Sequence[PreparedExample]) -> None:
        self.task, self.examples = task, examples

    def postprocess(self, logits: Sequence[Logits]) -> list[dict[str, Any]]:
        """Return one prediction per example; ``logits`` are those of every window, example after example."""
        remaining = iter(logits)
        return [
            self.task.postprocess(prepared, list(islice(remaining, len(prepared.windows))))
            for prepared in self.examples
        ]


class TaskBatch(NamedTuple):
    """Windows of a task; integers are int64."""

    tokens: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length) 1 for a token and 0 for padding
    token_type_ids: Tensor  # (batch, length) 1 for tokens of a second text
    global_attention_mask: Tensor  # (batch, length) 1 for global tokens
    # (batch,) classes, (batch, length) tags, (batch, 2) first and last position of an answer, or (batch, labels) zeros
    # and ones; IGNORE_INDEX for none
    labels: Tensor
    batch_examples: BatchExamples | None  # whole examples in evaluation; None in training
    groups: Tensor | None = None  # (batch, 2) example and part of each window, if the examples are whole


def collate(
    windows: Sequence[EncodedExample],
    pad_token_id: int,
    batch_examples: BatchExamples | None = None,
    groups: Tensor | None = None,
) -> TaskBatch:
    """Return windows as one batch, padded at the end to the longest."""

    def pad(arrays: Sequence[Any], value: int) -> Tensor:
        tensors = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    targets = [window.target if window.target is not None else NO_TARGET for window in windows]
    if all(len(target) == len(window.ids) for target, window in zip(targets, windows, strict=True)):
        labels = pad(targets, IGNORE_INDEX)
    else:
        labels = torch.from_numpy(np.stack(targets)).squeeze(-1)
    return TaskBatch(
        pad([window.ids for window in windows], pad_token_id),
        pad([np.ones_like(window.ids) for window in windows], 0),
        pad([window.token_type_ids for window in windows], 0),
        pad([window.global_attention_mask for window in windows], 0),
        labels,
        batch_examples,
        groups,
    )


def collate_examples(
    examples: Sequence[PreparedExample], pad_token_id: int, batch_examples: BatchExamples | None = None
) -> TaskBatch:
    """Return all windows of whole examples as one batch."""
    windows = [window for example in examples for window in example.windows]
    groups = [[index, window.part] for index, example in enumerate(examples) for window in example.windows]
    return collate(windows, pad_token_id, batch_examples, torch.tensor(groups))


class TrainingBatches(Generic[B]):
    """Endless passes over all windows, windows of similar length together; the position is a few integers.

    Resumed with another batch size or world size, what is left of the pass is assigned to these. Windows that do not
    make a batch for each rank are left out at the end of a pass, so each rank gets the same number of batches.
    ``collate_fn`` makes a batch from windows. With ``repeats``, the first ``steps_per_epoch`` batches are read again
    and again.
    """

    def __init__(
        self,
        windows: Sequence[Any],
        batch_size: int,
        collate_fn: Callable[[Sequence[Any]], B],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows, self.batch_size, self.collate_fn, self.seed = windows, batch_size, collate_fn, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        self.steps_per_epoch, self.repeats = len(self), False
        # Earlier batches of this pass: their size, the number of ranks, and how many batches each rank read.
        self._assignments: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return _batches_per_rank(len(self.windows), self.batch_size, self.world_size)

    def _make_batches(self, indices: Sequence[int], batch_size: int) -> list[list[int]]:
        """Return these windows as batches, in the order of this pass."""
        generator = np.random.default_rng([self.seed, self.epoch])
        shuffled = [indices[index] for index in generator.permutation(len(indices))]
        pool_size = SORT_POOL_BATCHES * batch_size
        batches: list[list[int]] = []
        for pool_start in range(0, len(shuffled), pool_size):
            pool = sorted(shuffled[pool_start : pool_start + pool_size], key=lambda index: len(self.windows[index].ids))
            batches += [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        return [batches[index] for index in generator.permutation(len(batches))]

    def _remaining(self) -> Sequence[int]:
        """Return the windows that earlier batches left of this pass."""
        remaining: Sequence[int] = range(len(self.windows))
        for batch_size, world_size, num_read in self._assignments:
            batches = self._make_batches(remaining, batch_size)[: world_size * num_read]
            read = {index for batch in batches for index in batch}
            remaining = [index for index in remaining if index not in read]
        return remaining

    def _rank_batches(self) -> list[list[int]]:
        """Return this rank's batches of what is left of the pass."""
        remaining = self._remaining()
        batches = self._make_batches(remaining, self.batch_size)
        count = _batches_per_rank(len(remaining), self.batch_size, self.world_size)
        # Every rank has as many, also with fewer batches than ranks.
        return (batches[self.rank :: self.world_size] or batches[:1])[:count]

    def __iter__(self) -> Iterator[B]:
        stop = self.steps_per_epoch if self.repeats else len(self)
        if self.position >= stop:
            # Not after the last batch: a loop that counts batches does not ask for the end.
            self.epoch, self.position, self._assignments = self.epoch + (not self.repeats), 0, []
        batches = self._rank_batches()
        while self.position < stop:
            # The rest of a pass ends where the pass does.
            indices = batches[self.position - len(self)]
            # Before the yield: a checkpoint written after this batch's step must count it.
            self.position += 1
            yield self.collate_fn([self.windows[index] for index in indices])

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what identifies the data."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "assignments": [list(assignment) for assignment in self._assignments],
            "num_windows": len(self.windows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position; raises CheckpointError if it is in other data."""
        saved = {**(current := self.state_dict()), **state_dict}
        for key in ("seed", "num_windows"):
            if saved[key] != current[key]:
                message = f"The checkpoint's data position belongs to {key} {saved[key]}, this run has {current[key]}."
                raise CheckpointError(message, "Resume with the config saved beside the checkpoint and its data.")
        self.epoch, self.position = int(saved["epoch"]), int(saved["position"])
        self._assignments = [tuple(assignment) for assignment in saved["assignments"]]
        if (saved["batch_size"], saved["world_size"]) != (self.batch_size, self.world_size):
            self._reassign(saved["batch_size"], saved["world_size"])

    def _reassign(self, batch_size: int, world_size: int) -> None:
        """Assign what batches of this size, on this many ranks, left of the pass to our own batches."""
        start = _batches_per_rank(len(self.windows), batch_size, world_size)
        start -= _batches_per_rank(len(self._remaining()), batch_size, world_size)
        self._assignments.append((batch_size, world_size, self.position - start))
        remaining_batches = -(-len(self._remaining()) // self.batch_size) // self.world_size
        self.position = len(self) - remaining_batches
        if not remaining_batches:
            self._assignments = []


def _batches_per_rank(num_windows: int, batch_size: int, world_size: int) -> int:
    """Return the number of batches of each rank; with fewer batches than ranks all ranks read one."""
    return max(1, -(-num_windows // batch_size) // world_size)


class EvaluationBatches(FixedBatches[TaskBatch]):
    """Every example once, all windows of one in the same batch of ``batch_size`` windows, or more if it has more."""

    def __init__(
        self,
        examples: Sequence[PreparedExample],
        task: Task,
        batch_size: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        batches: list[list[PreparedExample]] = []
        room = 0
        for example in sorted(
            examples[rank::world_size], key=lambda example: max(len(window.ids) for window in example.windows)
        ):
            if room < len(example.windows):
                batches.append([])
                room = batch_size
            batches[-1].append(example)
            room -= len(example.windows)

        def get_batch(index: int) -> TaskBatch:
            return collate_examples(batches[index], pad_token_id, BatchExamples(task, batches[index]))

        super().__init__(len(batches), get_batch)
