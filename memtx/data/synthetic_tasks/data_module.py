"""Episodes of a synthetic task as a Lightning data module, so that what evaluation measures can be trained on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from memtx.class_config import to_config
from memtx.data.batch import (
    IGNORE_INDEX,
    Batch,
    FixedBatches,
    PinnedTransfer,
    ResumableBatches,
    check_options,
    limit_epochs,
    rank_and_world_size,
)
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.errors import CheckpointError, DataError

TRAINING, VALIDATION, TEST = 0, 1, 2  # purposes of a batch; each has its own episodes, whatever the seed


def sample_batch(task: SyntheticTask, batch_size: int, num_segments: int, seed: tuple[int, ...]) -> Batch:
    """Return whole episodes, ``(batch, num_segments * segment_length)``; each begins a document.

    A function of the arguments only; the seed is non-negative numbers. A label is at the query token and is its answer,
    not the next token. A query counts as one word and one byte, so bits per byte are bits per answer.
    """
    # Hashed, so that neighboring numbers give unrelated episodes.
    hashed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    segments = list(task.iter_segments(batch_size, num_segments, torch.Generator().manual_seed(hashed)))
    tokens, labels = (torch.cat(part, dim=1) for part in zip(*segments, strict=True))
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    document_starts[:, 0] = True
    num_queries = (labels != IGNORE_INDEX).sum(1)
    return Batch(tokens, labels, document_starts, num_queries, num_queries.clone())


class SyntheticBatches(ResumableBatches):
    """Batches of new episodes for training, with a position that can be set; each rank has its own episodes."""

    def __init__(
        self, task: SyntheticTask, batch_size: int, num_segments: int, seed: int, steps_per_epoch: int, rank: int = 0
    ) -> None:
        super().__init__(steps_per_epoch)
        self.task, self.batch_size, self.num_segments, self.seed, self.rank = task, batch_size, num_segments, seed, rank

    def get_batch(self, step: int) -> Batch:
        """Return the batch of a step, ``(batch, num_segments * segment_length)``."""
        return sample_batch(self.task, self.batch_size, self.num_segments, (self.seed, TRAINING, self.rank, step))


class SyntheticDataModule(PinnedTransfer, LightningDataModule):
    """Episodes of a synthetic task, whole in every batch, so that one gradient goes through all of an episode.

    Raises DataError if a number is out of range.

    Args:
        task: Task such as ``AssociativeRecall``, which sets the model's vocabulary size and segment length.
        batch_size: Episodes of a batch on each device. At least 1.
        num_segments: Segments of an episode, more than those with content.
        seed: Seed of the episodes.
        steps_per_epoch: Batches of an epoch; each epoch has new episodes.
        eval_batch_size: Episodes of a batch in evaluation. None uses ``batch_size``.
        eval_steps: Batches of validation and of test. At least 1.
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
        check_options(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch, eval_steps=eval_steps)
        check_options(1, eval_batch_size=eval_batch_size)
        check_options(0, seed=seed)
        if num_segments <= task.num_write_segments:
            message = f"num_segments is {num_segments}, but the task writes in {task.num_write_segments}."
            raise DataError(message, f"Change --data.num_segments to at least {task.num_write_segments + 1}.")
        self.task, self.batch_size, self.num_segments, self.seed = task, batch_size, num_segments, seed
        self.vocab_size, self.segment_length = task.vocab_size, task.segment_length
        self.steps_per_epoch = steps_per_epoch
        self.eval_batch_size, self.eval_steps = eval_batch_size or batch_size, eval_steps
        self._batches: SyntheticBatches | None = None
        self._position = 0

    def setup(self, stage: str | None = None) -> None:
        """Begin at the start of the data, unless a checkpoint is restored later."""
        if stage in ("fit", None) and self._batches is not None:
            self._batches, self._position = None, 0

    def train_dataloader(self) -> SyntheticBatches:
        """Return this rank's batches from the position on."""
        rank, _ = rank_and_world_size(self.trainer)
        batches = SyntheticBatches(self.task, self.batch_size, self.num_segments, self.seed, self.steps_per_epoch, rank)
        limit_epochs(batches, self.trainer)
        batches.position = self._position if self._batches is None else self._batches.position
        self._batches = batches
        return batches

    def val_dataloader(self) -> FixedBatches[Batch]:
        """Return this rank's validation episodes, the same every time."""
        return self._evaluation_batches(VALIDATION)

    def test_dataloader(self) -> FixedBatches[Batch]:
        """Return this rank's test episodes, the same every time; also for prediction."""
        return self._evaluation_batches(TEST)

    predict_dataloader = test_dataloader

    def _evaluation_batches(self, purpose: int) -> FixedBatches[Batch]:
        rank, _ = rank_and_world_size(self.trainer)

        def get_batch(step: int) -> Batch:
            return sample_batch(self.task, self.eval_batch_size, self.num_segments, (self.seed, purpose, rank, step))

        return FixedBatches(self.eval_steps, get_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what identifies the episodes."""
        identity = {name: getattr(self, name) for name in ("batch_size", "num_segments", "seed")}
        position = self._position if self._batches is None else self._batches.position
        task = to_config(functools.partial(type(self.task), **dataclasses.asdict(self.task)))
        return {"position": position, "task": task, **identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position; raises CheckpointError if it is in other episodes."""
        for name, value in self.state_dict().items():
            if (saved := state_dict.get(name)) != value and name != "position":
                message = f"The checkpoint's episodes have {name} {saved}, this run's {value}."
                raise CheckpointError(message, "Use the config saved beside the checkpoint.")
        self._position = int(state_dict["position"])
        if self._batches is not None:
            self._batches.position = self._position
