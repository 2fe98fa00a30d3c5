"""Episodes of a drawn task behind Lightning's data hooks, so that what evaluation measures can be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.errors import CheckpointError, DataError

TRAINING, VALIDATION, TEST = 0, 1, 2
"""What a draw is for; each has episodes of its own, whatever the seed."""


def task_to_config(task: SyntheticTask) -> dict[str, Any]:
    """Return a task as JSON can hold it: what a checkpoint keeps of it."""
    kind = type(task)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dataclasses.asdict(task)}


def sample_batch(task: SyntheticTask, batch_size: int, num_segments: int, seed: tuple[int, ...]) -> Batch:
    """Return whole episodes: a function of arguments only.

    Here a label stands at the token that asks and is what answers it, not the token that follows. A question counts
    as one word and one byte, so that bits per byte are bits per answer.

    Args:
        task: the task.
        batch_size: episodes side by side; each begins a document.
        num_segments: an episode.
        seed: numbers from 0.

    Returns:
        Of (batch, num_segments * task.segment_length).
    """
    # Hashed, so that neighbouring numbers give unrelated episodes.
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    parts = list(task.iter_segments(batch_size, num_segments, torch.Generator().manual_seed(mixed)))
    tokens, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    asked = (labels != IGNORE_INDEX).sum(1)
    return Batch(tokens, labels, starts, asked, asked.clone())


class SyntheticBatches:
    """Batches of new episodes for training, with a position that can be set.

    Args:
        task: the task.
        batch_size: episodes of a batch.
        num_segments: an episode.
        seed: of the draw, at least 0.
        steps_per_epoch: batches of an epoch.
        rank: this process, which draws episodes of its own.

    Attributes:
        position: batches handed out so far, equal on all ranks.
    """

    def __init__(
        self, task: SyntheticTask, batch_size: int, num_segments: int, seed: int, steps_per_epoch: int, rank: int = 0
    ) -> None:
        self.task, self.batch_size, self.num_segments = task, batch_size, num_segments
        self.seed, self.steps_per_epoch, self.rank = seed, steps_per_epoch, rank
        self.position = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.position // self.steps_per_epoch + 1) * self.steps_per_epoch
        while self.position < stop:
            batch = sample_batch(
                self.task, self.batch_size, self.num_segments, (self.seed, TRAINING, self.rank, self.position)
            )
            # Before the yield: a checkpoint of this batch's step must not draw it again.
            self.position += 1
            yield batch


class FixedSyntheticBatches:
    """The same episodes every time, for validation and test; arguments as of :class:`SyntheticBatches`."""

    def __init__(
        self, task: SyntheticTask, batch_size: int, num_segments: int, seed: tuple[int, ...], num_batches: int
    ) -> None:
        self.task, self.batch_size, self.num_segments, self.seed, self.num_batches = (
            task,
            batch_size,
            num_segments,
            seed,
            num_batches,
        )

    def __len__(self) -> int:
        """Batches."""
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.num_batches):
            yield sample_batch(self.task, self.batch_size, self.num_segments, (*self.seed, step))


class SyntheticDataModule(LightningDataModule):
    """Episodes of a drawn task, whole in every batch, so that one gradient goes through all of one.

    Args:
        task: such as ``AssociativeRecall``; its vocabulary and its segment are the model's.
        batch_size: episodes of a batch on each device, at least 1.
        num_segments: an episode, more than the task writes in.
        seed: of the draw.
        steps_per_epoch: batches of an epoch; episodes are new in every one.
        eval_batch_size: episodes of a batch in evaluation; null for as many as in training.
        eval_steps: batches of validation and of test, at least 1.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        task: SyntheticTask,
        batch_size: int = 32,
        num_segments: int = 4,
        seed: int = 0,
        steps_per_epoch: int = 1000,
        eval_batch_size: int | None = None,
        eval_steps: int = 4,
    ) -> None:
        super().__init__()
        numbers = {
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "eval_batch_size": eval_batch_size,
            "eval_steps": eval_steps,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        if num_segments <= task.num_write_segments:
            raise DataError(
                f"num_segments is {num_segments}, but the task writes in {task.num_write_segments}.",
                f"Change --data.num_segments to at least {task.num_write_segments + 1}.",
            )
        if seed < 0:
            raise DataError(f"seed is {seed}, expected at least 0.", "Change --data.seed.")
        self.task, self.batch_size, self.num_segments, self.seed, self.steps_per_epoch = (
            task,
            batch_size,
            num_segments,
            seed,
            steps_per_epoch,
        )
        self.eval_batch_size, self.eval_steps = eval_batch_size or batch_size, eval_steps
        self._batches: SyntheticBatches | None = None
        self._position = 0

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs."""
        return self.task.vocab_size

    @property
    def segment_length(self) -> int:
        """Tokens an episode gives the model in one call."""
        return self.task.segment_length

    def setup(self, stage: str | None = None) -> None:
        """Begin at the start of the data; a checkpoint says otherwise later."""
        if stage in ("fit", None) and self._batches is not None:
            self._batches, self._position = None, 0

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def train_dataloader(self) -> SyntheticBatches:
        """Return this rank's batches, going on from the position."""
        made = SyntheticBatches(
            self.task, self.batch_size, self.num_segments, self.seed, self.steps_per_epoch, self._rank()
        )
        made.position = self._current_position
        self._batches = made
        return made

    def val_dataloader(self) -> FixedSyntheticBatches:
        """Return this rank's validation episodes."""
        return self._evaluation_batches(VALIDATION)

    def test_dataloader(self) -> FixedSyntheticBatches:
        """Return this rank's test episodes."""
        return self._evaluation_batches(TEST)

    def predict_dataloader(self) -> FixedSyntheticBatches:
        """Return this rank's test episodes."""
        return self._evaluation_batches(TEST)

    def _evaluation_batches(self, purpose: int) -> FixedSyntheticBatches:
        seed = (self.seed, purpose, self._rank())
        return FixedSyntheticBatches(self.task, self.eval_batch_size, self.num_segments, seed, self.eval_steps)

    @property
    def _current_position(self) -> int:
        return self._position if self._batches is None else self._batches.position

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in."""
        return {"position": self._current_position, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {
            "task": task_to_config(self.task),
            "batch_size": self.batch_size,
            "num_segments": self.num_segments,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position.

        Raises:
            CheckpointError: it is one in other episodes.
        """
        for name, own in self._identity().items():
            if (kept := state_dict.get(name)) != own:
                raise CheckpointError(
                    f"The checkpoint's episodes have {name} {kept}, this run's {own}.",
                    "Use the config saved beside the checkpoint.",
                )
        self._position = int(state_dict["position"])
        if self._batches is not None:
            self._batches.position = self._position
