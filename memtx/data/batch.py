"""Batches of streams, and what all data loaders share: resumable iteration, option checks, ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.errors import DataError

B = TypeVar("B")

IGNORE_INDEX = -100  # label of a position that is not scored; the default of PyTorch's cross entropy


class Batch(NamedTuple):
    """Token streams that continue where the previous batch ended.

    A plain tuple type, because Lightning moves its tensors to the device and rejects frozen dataclasses here.

    Attributes:
        tokens: ``(batch, length)`` int64.
        labels: ``(batch, length)`` int64. The next token, also across the end of the batch; ``IGNORE_INDEX`` where
            another document begins or nothing follows. The begin token is never a label.
        document_starts: ``(batch, length)`` bool, True where a document begins.
        num_words: ``(batch,)`` int64. Whitespace-separated words of raw text that the scored labels cover. The words of
            a document are spread evenly over its text tokens and rounded down cumulatively, so sums over a whole
            document are exact.
        num_bytes: ``(batch,)`` int64. UTF-8 bytes of raw text, counted in the same way.
    """

    tokens: Tensor
    labels: Tensor
    document_starts: Tensor
    num_words: Tensor
    num_bytes: Tensor


class SequenceBatch(NamedTuple):
    """Streams of vectors that continue where the previous batch ended.

    Attributes:
        inputs: ``(batch, length, input_dim)`` float.
        labels: ``(batch, length, output_dim)`` float, the vector to predict at each step; NaN where nothing is scored.
        document_starts: ``(batch, length)`` bool, True where a series or an episode begins.
    """

    inputs: Tensor
    labels: Tensor
    document_starts: Tensor

    @property
    def tokens(self) -> Tensor:
        """One element per step, which callbacks count."""
        return self.document_starts


class PinnedTransfer:
    """A mixin of data modules: batches move to a GPU from pinned memory, so that the host does not wait for them."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device."""
        if device.type == "cuda":
            batch = pytree.tree_map_only(Tensor, lambda x: x if x.is_cuda else x.pin_memory(), batch)
        # Of LightningDataModule, which Lightning's import of some seconds keeps out of this file.
        return super().transfer_batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]


class ResumableBatches(ABC):
    """Endless training batches, each a function of its step alone, with a position that can be set.

    Iterating continues from the position to the end of the epoch, the next multiple of ``steps_per_epoch``.

    Attributes:
        steps_per_epoch: Batches of an epoch; at most ``len``, those of a pass.
        repeats: If True, every epoch has the batches of the first.
        position: Batches handed out so far, counted when they are handed out; equal on all ranks.
        before_batch: Called before each batch; may change the next ones.
    """

    before_batch: Callable[[], None] | None = None

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = self._num_batches = steps_per_epoch
        self.position, self.repeats = 0, False

    @abstractmethod
    def get_batch(self, step: int) -> Any:
        """Return the batch of a step, ``(batch, length)``; steps count from the start of the first epoch."""

    def __len__(self) -> int:
        """Return the batches of a pass; constant, because Lightning asks once."""
        return self._num_batches

    def step_at(self, position: int) -> int:
        """Return the step of the batch at a position."""
        return position % self.steps_per_epoch if self.repeats else position

    def __iter__(self) -> Iterator[Any]:
        stop = (self.position // self.steps_per_epoch + 1) * self.steps_per_epoch
        while self.position < stop:
            if self.before_batch is not None:
                self.before_batch()
            batch = self.get_batch(self.step_at(self.position))
            # Before the yield: a checkpoint written in this batch's step must not read the batch again.
            self.position += 1
            yield batch


class FixedBatches(Generic[B]):
    """The same batches in every iteration, made when read. No list: Lightning takes one for several loaders."""

    def __init__(self, num_batches: int, get_batch: Callable[[int], B]) -> None:
        self._num_batches, self._get_batch = num_batches, get_batch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[B]:
        return map(self._get_batch, range(self._num_batches))


def count_limited(num_batches: int, limit: float) -> int:
    """Return the batches that a Lightning trainer reads of ``num_batches``; a float limit is a fraction of them."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def limit_epochs(batches: Any, trainer: Any) -> None:
    """End epochs of training batches where a Lightning trainer does, and repeat the first for ``overfit_batches``."""
    if trainer is not None:
        batches.steps_per_epoch = max(1, count_limited(len(batches), trainer.limit_train_batches))
        batches.repeats = trainer.overfit_batches > 0


def check_options(minimum: int, /, **options: int | None) -> None:
    """Raise DataError for the first data option that is below ``minimum``; None passes."""
    for name, value in options.items():
        if value is not None and value < minimum:
            raise DataError(f"{name} is {value}, expected at least {minimum}.", f"Change --data.{name}.")


def rank_and_world_size(trainer: Any) -> tuple[int, int]:
    """Return a Lightning trainer's rank and number of processes; (0, 1) without a trainer."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
