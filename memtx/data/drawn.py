"""Episodes of a drawn task behind Lightning's data hooks, so that what evaluation measures can be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from memtx.data.batch import IGNORED, Batch
from memtx.data.episodes.base import Task
from memtx.errors import CheckpointError, DataError

TRAINING, VALIDATION, TEST = 0, 1, 2
"""What a draw is for; each has episodes of its own, whatever the seed."""


def described(task: Task) -> dict[str, Any]:
    """Return a task as JSON can hold it: what a checkpoint keeps of it."""
    kind = type(task)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dataclasses.asdict(task)}


def draw(task: Task, rows: int, segments: int, seed: tuple[int, ...]) -> Batch:
    """Return whole episodes: a function of arguments only.

    Here a label stands at the token that asks and is what answers it, not the token that follows. A question counts
    as one word and one byte, so that bits per byte are bits per answer.

    Args:
        task: the task.
        rows: episodes side by side; each begins a document.
        segments: an episode.
        seed: numbers from 0.

    Returns:
        Of (rows, segments * task.segment).
    """
    # Hashed, so that neighbouring numbers give unrelated episodes.
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    parts = list(task.episodes(rows, segments, torch.Generator().manual_seed(mixed)))
    tokens, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    asked = (labels != IGNORED).sum(1)
    return Batch(tokens, labels, starts, asked, asked.clone())


class DrawnBatches:
    """Batches of new episodes for training, with a position that can be set.

    Args:
        task: the task.
        rows: episodes of a batch.
        segments: an episode.
        seed: of the draw, at least 0.
        steps: batches of an epoch.
        rank: this process, which draws episodes of its own.

    Attributes:
        position: batches handed out so far, equal on all ranks.
    """

    def __init__(self, task: Task, rows: int, segments: int, seed: int, steps: int, rank: int = 0) -> None:
        self.task, self.rows, self.segments = task, rows, segments
        self.seed, self.steps, self.rank = seed, steps, rank
        self.position = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.position // self.steps + 1) * self.steps
        while self.position < stop:
            batch = draw(self.task, self.rows, self.segments, (self.seed, TRAINING, self.rank, self.position))
            # Before the yield: a checkpoint of this batch's step must not draw it again.
            self.position += 1
            yield batch


class FixedBatches:
    """The same episodes every time, for validation and test; arguments as of :class:`DrawnBatches`."""

    def __init__(self, task: Task, rows: int, segments: int, seed: tuple[int, ...], steps: int) -> None:
        self.task, self.rows, self.segments, self.seed, self.steps = task, rows, segments, seed, steps

    def __len__(self) -> int:
        """Batches."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield draw(self.task, self.rows, self.segments, (*self.seed, step))


class EpisodeDataModule(LightningDataModule):
    """Episodes of a drawn task, whole in every batch, so that one gradient goes through all of one.

    Args:
        task: such as ``Recall``; its vocabulary and its segment are the model's.
        rows: episodes of a batch on each device, at least 1.
        segments: an episode, more than the task writes in.
        seed: of the draw.
        steps: batches of an epoch; episodes are new in every one.
        eval_rows: episodes of a batch in evaluation; null for as many as in training.
        eval_steps: batches of validation and of test, at least 1.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        task: Task,
        rows: int = 32,
        segments: int = 4,
        seed: int = 0,
        steps: int = 1000,
        eval_rows: int | None = None,
        eval_steps: int = 4,
    ) -> None:
        super().__init__()
        numbers = {"rows": rows, "steps": steps, "eval_rows": eval_rows, "eval_steps": eval_steps}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}, expected at least 1.", f"Change --data.{name}.")
        if segments <= task.written:
            raise DataError(
                f"segments is {segments}, but the task writes in {task.written}.",
                f"Change --data.segments to at least {task.written + 1}.",
            )
        if seed < 0:
            raise DataError(f"seed is {seed}, expected at least 0.", "Change --data.seed.")
        self.task, self.rows, self.segments, self.seed, self.steps = task, rows, segments, seed, steps
        self.eval_rows, self.eval_steps = eval_rows or rows, eval_steps
        self._batches: DrawnBatches | None = None
        self._position = 0

    @property
    def vocab_size(self) -> int:
        """Rows the model's embedding needs."""
        return self.task.vocab_size

    @property
    def segment(self) -> int:
        """Tokens a row gives the model in one call."""
        return self.task.segment

    def setup(self, stage: str | None = None) -> None:
        """Begin at the start of the data; a checkpoint says otherwise later."""
        if stage in ("fit", None) and self._batches is not None:
            self._batches, self._position = None, 0

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def train_dataloader(self) -> DrawnBatches:
        """Return this rank's batches, going on from the position."""
        made = DrawnBatches(self.task, self.rows, self.segments, self.seed, self.steps, self._rank())
        made.position = self._at
        self._batches = made
        return made

    def val_dataloader(self) -> FixedBatches:
        """Return this rank's validation episodes."""
        return self._measured(VALIDATION)

    def test_dataloader(self) -> FixedBatches:
        """Return this rank's test episodes."""
        return self._measured(TEST)

    def predict_dataloader(self) -> FixedBatches:
        """Return this rank's test episodes."""
        return self._measured(TEST)

    def _measured(self, purpose: int) -> FixedBatches:
        seed = (self.seed, purpose, self._rank())
        return FixedBatches(self.task, self.eval_rows, self.segments, seed, self.eval_steps)

    @property
    def _at(self) -> int:
        return self._position if self._batches is None else self._batches.position

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in."""
        return {"position": self._at, **self._drawn()}

    def _drawn(self) -> dict[str, Any]:
        return {"task": described(self.task), "rows": self.rows, "segments": self.segments, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's position.

        Raises:
            CheckpointError: it is one in other episodes.
        """
        for name, own in self._drawn().items():
            if (kept := state_dict.get(name)) != own:
                raise CheckpointError(
                    f"The checkpoint's episodes have {name} {kept}, this run's {own}.",
                    "Use the config saved beside the checkpoint.",
                )
        self._position = int(state_dict["position"])
        if self._batches is not None:
            self._batches.position = self._position
