"""Training in phases with longer windows, longer segments and lower learning rates (Longformer's staged training)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch

from memtx.checkpoint import trainer_state
from memtx.errors import MemtxError, check_at_least, check_positive
from memtx.models.growing_windows import scale_windows
from memtx.training.carry import get_carry
from memtx.training.optimizers import PhasedWarmup, SchedulerFactory, find_phase


class StagedTraining(pl.Callback):
    """Trains in phases, each with longer windows and segments and a lower learning rate.

    Beltagy et al. 2020, section 4.2 and appendix B: a model learns nearby dependencies first, in many cheap steps. The
    config's model, segment length, batch size and learning rate are those of the first phase. A checkpoint describes
    its model with the windows of its phase; a run resumes in it. When windows or batches change, all streams go on in
    the middle of their documents with a fresh memory.

    Args:
        steps: Optimizer steps of each phase; the last one lasts to the end of the run.
        window_factor: Factor from phase to phase of all exact windows, those that ``memtx.GrowingWindows`` sets. 1
            keeps them. Defaults to 2.
        length_factor: Factor of the segment length. 1 keeps it. Defaults to 2.
        max_segment_length: Largest segment length. None sets no limit.
        batch_sizes: Streams per device in each phase. Defaults to the config's in all.
        lr_factor: Factor of the learning rate, which is constant within a phase after a warm-up:
            :class:`~memtx.training.optimizers.PhasedWarmup` replaces ``model.scheduler``. None keeps that scheduler.
            Defaults to 0.5.
        warmup_fraction: Fraction of a phase's steps until its full learning rate. Defaults to 0.1.
        max_warmup_steps: Steps of a warm-up at most. Defaults to 10,000.

    Raises:
        MemtxError: A number is out of range, or the model or the data cannot be changed.
    """

    def __init__(
        self,
        steps: Sequence[int],
        window_factor: float = 2.0,
        length_factor: float = 2.0,
        max_segment_length: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        lr_factor: float | None = 0.5,
        warmup_fraction: float = 0.1,
        max_warmup_steps: int = 10_000,
    ) -> None:
        for count in steps:
            check_at_least(1, steps=count)
        for batch_size in batch_sizes or ():
            check_at_least(1, batch_sizes=batch_size)
        if max_segment_length is not None:
            check_at_least(1, max_segment_length=max_segment_length)
        if not steps or (batch_sizes is not None and len(batch_sizes) != len(steps)):
            message = f"StagedTraining has {len(steps)} steps and batch_sizes {batch_sizes}."
            raise MemtxError(message, "Give one number of steps per phase, and as many batch_sizes or none.")
        check_positive(window_factor=window_factor, length_factor=length_factor)
        self.steps, self.window_factor, self.length_factor = tuple(steps), window_factor, length_factor
        self.max_segment_length, self.batch_sizes = max_segment_length, batch_sizes
        self.make_scheduler: SchedulerFactory | None = None
        if lr_factor is not None:
            self.make_scheduler = partial(
                PhasedWarmup, steps=self.steps, factor=lr_factor, warmup_fraction=warmup_fraction,
                max_warmup_steps=max_warmup_steps,
            )  # fmt: skip
            self.make_scheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0))  # which checks the numbers
        self._memories: Any = None
        self._first_shape = 0, 0  # batch size and segment length of the first phase
        self._window_phase = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check model and data, and replace the schedule."""
        module: Any = pl_module
        self._find_windows(module.model)
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.length_factor != 1 or self.batch_sizes is not None:
            if not hasattr(data, "change_batches"):
                message = f"StagedTraining cannot change the segments of {type(data).__name__}."
                raise MemtxError(message, "Set its length_factor to 1 and batch_sizes to null, or use BookDataModule.")
            self._first_shape = data.batch_size, data.segment_length
            data.on_next_batch(lambda: self._set_batches(data, self._phase_at(trainer.global_step)))
        if self.make_scheduler is not None:
            module.make_scheduler = self.make_scheduler

    def on_load_model(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go to the phase of a checkpoint's last step, before its model is compared with the run's."""
        self._find_windows(pl_module.model)
        phase = self._phase_at(max(checkpoint["global_step"] - 1, 0))
        if self._memories is not None:
            self._set_windows(pl_module.model, phase)
        if self._first_shape[0]:
            self._set_batches(trainer.datamodule, phase)  # type: ignore[attr-defined]

    def _find_windows(self, model: Any) -> None:
        """Note the windows of the first phase, once; raise MemtxError if those of the last do not fit the model."""
        if self._memories is not None or self.window_factor == 1:
            return
        memories = getattr(model, "config", {"init_args": {}})["init_args"].get("memories")
        if memories is None:
            message = f"StagedTraining cannot change the windows of {type(model).__name__}."
            raise MemtxError(message, "Set its window_factor to 1.")
        self._memories = copy.deepcopy(memories)
        for phase in (len(self.steps) - 1, 0):
            self._set_windows(model, phase)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the phase of this step."""
        module: Any = pl_module
        phase = self._phase_at(trainer.global_step)
        if self._first_shape[0]:
            module.segment_length = self._shape(phase)[1]
        if self._memories is not None and phase != self._window_phase:
            self._set_windows(module.model, phase)
            if (carry := get_carry(module)) is not None:
                carry.reset("train")
            window = max(getattr(block.attention.memory, "window", 0) for block in module.model._layers())
            message = f"Phase {phase + 1} of {len(self.steps)}: windows of up to {window:,} tokens"
            trainer_state.write_status(trainer, f"{message}, segments of {module.segment_length:,}; fresh memory.")
        module.log("phase", float(phase + 1))

    def _phase_at(self, step: int) -> int:
        return find_phase(self.steps, step)[0]

    def _set_windows(self, model: Any, phase: int) -> None:
        scale_windows(model, self._memories, self.window_factor**phase)
        self._window_phase = phase

    def _shape(self, phase: int) -> tuple[int, int]:
        """Return batch size and segment length of a phase."""
        batch_size, segment_length = self._first_shape
        length = max(1, int(segment_length * self.length_factor**phase))
        sizes = self.batch_sizes
        return sizes[phase] if sizes else batch_size, min(length, self.max_segment_length or length)

    def _set_batches(self, data: Any, phase: int) -> None:
        if (shape := self._shape(phase)) != (data.batch_size, data.segment_length):
            data.change_batches(*shape)
