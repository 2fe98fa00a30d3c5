"""Episodes as a Lightning data module: every row of a batch is a document of its own, whole in one backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Generator

from memtx.data.batch import (
    Batch,
    FixedBatches,
    PinnedTransfer,
    ResumableBatches,
    check_options,
    limit_epochs,
    rank_and_world_size,
)
from memtx.errors import CheckpointError, DataError

TRAINING, VALIDATION, TEST = 0, 1, 2  # purposes of a batch; each has its own episodes, whatever the seed

NumSegments: TypeAlias = int | dict[int, int]
"""Segments of an episode, or a curriculum: the first batch with each number -> that number."""


def make_generator(seed: tuple[int, ...]) -> Generator:
    """Return a generator from non-negative numbers, hashed, so that neighboring numbers give unrelated episodes."""
    hashed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return Generator().manual_seed(hashed)


class EpisodeBatches(ResumableBatches):
    """Batches of new episodes for training, with a position that can be set; each rank has its own episodes."""

    def __init__(self, module: EpisodeDataModule, rank: int = 0) -> None:
        super().__init__(module.steps_per_epoch)
        self.module, self.rank = module, rank

    def get_batch(self, step: int) -> Batch:
        """Return the batch of a step, ``(batch, num_segments * segment_length)``."""
        module, seed = self.module, (self.module.seed, TRAINING, self.rank, step)
        num_segments = module.num_segments_at(step)
        if module.shorter_episodes:
            # The same on all ranks, which then have the same work; a seed of its own leaves the episodes as they are.
            generator = make_generator((*seed[:2], step, 0, 0))
            if float(torch.rand((), generator=generator)) < module.shorter_episodes:
                fewest = min(module.curriculum.values())
                num_segments = int(torch.randint(fewest, num_segments + 1, (), generator=generator))
        return module.sample_batch(module.batch_size, num_segments, seed)


class EpisodeDataModule(PinnedTransfer, LightningDataModule, ABC):
    """Base of data modules of generated episodes. Raises DataError if a number is out of range.

    Args:
        batch_size: Episodes of a batch on each device. At least 1.
        num_segments: Segments of an episode; or a curriculum as a mapping from batches to numbers, such as
            ``{0: 1, 500: 2, 1000: 4}`` for episodes of one segment in the first 500 batches (Bulatov et al. 2022,
            section 4, train Recurrent Memory Transformers so). Batches count from the start of training. Validation and
            test have the last number.
        seed: Seed of the episodes.
        steps_per_epoch: Batches of an epoch; each epoch has new episodes.
        eval_batch_size: Episodes of a batch in evaluation. None uses ``batch_size``.
        eval_steps: Batches of validation and of test. At least 1.
        shorter_episodes: Fraction of batches with a random number of segments between the fewest of the curriculum and
            the current number, so that short episodes are not forgotten. From 0 to 1.

    Attributes:
        vocab_size: Vocabulary size.
        segment_length: Tokens of a segment.
    """

    vocab_size: int
    segment_length: int
    min_segments = 1

    def __init__(
        self,
        batch_size: int,
        num_segments: NumSegments,
        seed: int,
        steps_per_epoch: int,
        eval_batch_size: int | None,
        eval_steps: int,
        shorter_episodes: float = 0.0,
    ) -> None:
        super().__init__()
        check_options(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch, eval_steps=eval_steps)
        check_options(1, eval_batch_size=eval_batch_size)
        check_options(0, seed=seed)
        if not 0 <= shorter_episodes <= 1:
            message = f"shorter_episodes is {shorter_episodes}, expected 0 to 1."
            raise DataError(message, "Change --data.shorter_episodes.")
        curriculum = dict(sorted(num_segments.items())) if isinstance(num_segments, dict) else {0: num_segments}
        if min(curriculum, default=-1) != 0:
            message = f"num_segments begins at batch {min(curriculum, default=None)}, expected 0."
            raise DataError(message, "Begin the curriculum with 0: N.")
        if (fewest := min(curriculum.values())) < self.min_segments:
            message = f"num_segments is {fewest}, expected at least {self.min_segments}."
            raise DataError(message, f"Change --data.num_segments to at least {self.min_segments}.")
        self.batch_size, self.seed, self.steps_per_epoch = batch_size, seed, steps_per_epoch
        self.curriculum, self.shorter_episodes = curriculum, shorter_episodes
        self.num_segments = list(curriculum.values())[-1]
        self.eval_batch_size, self.eval_steps = eval_batch_size or batch_size, eval_steps
        self._batches: EpisodeBatches | None = None
        self._position = 0

    @abstractmethod
    def sample_batch(self, batch_size: int, num_segments: int, seed: tuple[int, ...]) -> Batch:
        """Return whole episodes, ``(batch, num_segments * segment_length)``, a function of the arguments only.

        The second number of ``seed`` is ``TRAINING``, ``VALIDATION`` or ``TEST``.
        """

    @abstractmethod
    def _describe_episodes(self) -> dict[str, Any]:
        """Return what identifies the episodes beside the options of this class, as JSON values."""

    def num_segments_at(self, step: int) -> int:
        """Return the segments of an episode in a batch of training."""
        return self.curriculum[max(start for start in self.curriculum if start <= step)]

    def setup(self, stage: str | None = None) -> None:
        """Begin at the start of the data, unless a checkpoint is restored later."""
        if stage in ("fit", None) and self._batches is not None:
            self._batches, self._position = None, 0

    def train_dataloader(self) -> EpisodeBatches:
        """Return this rank's batches from the position on."""
        batches = EpisodeBatches(self, rank_and_world_size(self.trainer)[0])
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
            return self.sample_batch(self.eval_batch_size, self.num_segments, (self.seed, purpose, rank, step))

        return FixedBatches(self.eval_steps, get_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what identifies the episodes."""
        position = self._position if self._batches is None else self._batches.position
        is_constant = len(self.curriculum) == 1
        segments = self.num_segments if is_constant else [list(entry) for entry in self.curriculum.items()]
        identity: dict[str, Any] = {"batch_size": self.batch_size, "num_segments": segments, "seed": self.seed}
        if self.shorter_episodes:
            identity["shorter_episodes"] = self.shorter_episodes
        return {"position": position, **identity, **self._describe_episodes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint's position; raises CheckpointError if it is in other episodes."""
        for name, value in self.state_dict().items():
            if (saved := state_dict.get(name)) != value and name != "position":
                message = f"The checkpoint's episodes have {name} {saved}, this run's {value}."
                raise CheckpointError(message, "Use the config saved beside the checkpoint.")
        self._position = int(state_dict["position"])
        if self._batches is not None:
            self._batches.position = self._position
