"""Data modules whose training batches are endless streams: the position in them, across loaders and checkpoints."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from memtx.data.batch import PinnedTransfer
from memtx.data.streams import EndlessStreams

S = TypeVar("S", bound=EndlessStreams[Any])


class StreamDataModule(PinnedTransfer, LightningDataModule, Generic[S]):
    """Base of data modules with a position in streams of training data."""

    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._streams: S | None = None
        self._restored_position: dict[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Let a fit begin at the start, unless a checkpoint is restored."""
        if stage in ("fit", None) and self._streams is not None:
            self._streams = self._restored_position = None

    def _continue_with(self, streams: S) -> S:
        """Return new streams at the position so far, which they hold from now on."""
        if self._streams is not None:  # called again within a run
            streams.load_state_dict(self._streams.state_dict())
        elif self._restored_position is not None:
            self._resume(streams, self._restored_position)
        self._streams, self._restored_position = streams, None
        return streams

    def _position_state(self) -> dict[str, Any]:
        """Return the position and what identifies its data."""
        if self._streams is not None:
            return self._streams.state_dict()
        return self._restored_position or {"position": 0, "seed": self.seed}

    def _restore_position(self, position: dict[str, Any]) -> None:
        """Restore a position, which is checked when the training data is opened."""
        if self._streams is not None:
            self._resume(self._streams, position)
        else:
            self._restored_position = position

    def _resume(self, streams: S, position: dict[str, Any]) -> None:
        streams.load_state_dict(position, self.trainer.accumulate_grad_batches if self.trainer is not None else 1)
        if streams.resume_message:
            rank_zero_info(streams.resume_message)
