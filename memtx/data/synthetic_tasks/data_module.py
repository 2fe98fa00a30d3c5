"""Episodes of a synthetic task as a Lightning data module, so that what evaluation measures can be trained on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from memtx.class_config import to_config
from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.episodes import EpisodeDataModule, NumSegments, make_generator
from memtx.data.synthetic_tasks.base import SyntheticTask


class SyntheticDataModule(EpisodeDataModule):
    """Episodes of a synthetic task, whole in every batch, so that one gradient goes through all of an episode.

    Raises DataError if a number is out of range.

    Args:
        task: Task such as ``AssociativeRecall``, which sets the model's vocabulary size and segment length.
        batch_size: Episodes of a batch on each device. At least 1.
        num_segments: Segments of an episode, more than those with content; or a curriculum, as for
            :class:`~memtx.data.episodes.EpisodeDataModule`.
        seed: Seed of the episodes.
        steps_per_epoch: Batches of an epoch; each epoch has new episodes.
        eval_batch_size: Episodes of a batch in evaluation. None uses ``batch_size``.
        eval_steps: Batches of validation and of test. At least 1.
        shorter_episodes: Fraction of batches with fewer segments than the curriculum's current number.
    """

    def __init__(
        self,
        task: SyntheticTask,
        batch_size: int = 32,
        num_segments: NumSegments = 4,
        seed: int = 0,
        steps_per_epoch: int = 1000,
        eval_batch_size: int | None = None,
        eval_steps: int = 4,
        shorter_episodes: float = 0.0,
    ) -> None:
        self.task, self.min_segments = task, task.num_write_segments + 1
        super().__init__(batch_size, num_segments, seed, steps_per_epoch, eval_batch_size, eval_steps, shorter_episodes)
        self.vocab_size, self.segment_length = task.vocab_size, task.segment_length

    def sample_batch(self, batch_size: int, num_segments: int, seed: tuple[int, ...]) -> Batch:
        """Return whole episodes, ``(batch, num_segments * segment_length)``; each begins a document.

        A label is at the query token and is its answer, not the next token. A query counts as one word and one byte, so
        bits per byte are bits per answer.
        """
        segments = list(self.task.iter_segments(batch_size, num_segments, make_generator(seed)))
        tokens, labels = (torch.cat(part, dim=1) for part in zip(*segments, strict=True))
        document_starts = torch.zeros_like(tokens, dtype=torch.bool)
        document_starts[:, 0] = True
        num_queries = (labels != IGNORE_INDEX).sum(1)
        return Batch(tokens, labels, document_starts, num_queries, num_queries.clone())

    def _describe_episodes(self) -> dict[str, Any]:
        """Return the task with its sizes."""
        return {"task": to_config(functools.partial(type(self.task), **dataclasses.asdict(self.task)))}
