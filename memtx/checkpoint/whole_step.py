"""Snapshot after every optimizer step, so that a run which ends within a step can save the last whole one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl

from memtx.checkpoint import pretrained, rng, trainer_state

_FIRST_BATCH_STARTED = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


@dataclass(frozen=True)
class WholeStep:
    """State of a run after an optimizer step, except for what only the next step's update changes."""

    global_step: int
    epoch: int
    loop_state: dict[str, Any]
    loader_states: list[Any]
    module_state: Any
    rng_state: dict[str, Any]

    @classmethod
    def capture(cls, trainer: pl.Trainer) -> WholeStep:
        """Return the snapshot of a trainer whose current batch ended in an optimizer step; copies no tensor."""
        progress = trainer.global_step, trainer.current_epoch, trainer.fit_loop.state_dict()
        return cls(
            *progress,
            [_get_loader_state(loader) for loader in _get_loaders(trainer)],
            cast(Any, getattr(trainer.lightning_module, "step_state", dict))(),
            rng.get_rng_state(),
        )

    def dump_checkpoint(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the checkpoint of this step; sets the data position and the module's state back to it."""
        for loader, state in zip(_get_loaders(trainer), self.loader_states, strict=True):
            _set_loader_state(loader, state)
        if (restore := cast(Any, getattr(trainer.lightning_module, "restore_step_state", None))) is not None:
            restore(self.module_state)
        rng_state = rng.get_rng_state()
        rng.set_rng_state(self.rng_state)
        checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(False)
        rng.set_rng_state(rng_state)
        checkpoint |= {"global_step": self.global_step, "epoch": self.epoch}
        checkpoint["loops"]["fit_loop"] = self.loop_state
        if trainer.validating:
            # As if its first batch was being read, which makes the resumed run begin with this validation.
            for counts in ("total", "current"):
                self.loop_state["epoch_loop.val_loop.batch_progress"][counts] |= _FIRST_BATCH_STARTED
        if pretrained.CHECKPOINT_KEY in checkpoint:
            checkpoint[pretrained.CHECKPOINT_KEY]["has_stepped"] = True
        return checkpoint


def is_between_steps(trainer: pl.Trainer) -> bool:
    """Return whether the callbacks of a batch that ended in an optimizer step are running."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.completed < progress.processed == progress.ready and trainer_state.has_stepped(trainer)


def _get_loaders(trainer: pl.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _get_loader_state(loader: Any) -> Any:
    return loader.state_dict() if hasattr(loader, "state_dict") else getattr(loader, "position", None)


def _set_loader_state(loader: Any, state: Any) -> None:
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict(state)
    elif state is not None:
        loader.position = state
