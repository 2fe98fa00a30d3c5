"""Base of all training modules: optimizer and schedule, shared steps, and the contents of a checkpoint."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from memtx.checkpoint import pretrained, rng, trainer_state
from memtx.data.batch import count_limited
from memtx.errors import CheckpointError, MemtxError
from memtx.training import averaging, preflight
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.model_outputs import ModelOutputs
from memtx.training.fsdp import configure_sharding
from memtx.training.optimizers import (
    OptimizerFactory,
    SchedulerFactory,
    WarmupCosine,
    build_optimizer,
    build_scheduler,
    default_optimizer,
)

_DISTILLATION_PREFIX = "distillation."
"""Prefix of a distillation's own weights in a checkpoint."""


class BaseModule(pl.LightningModule):
    """A Lightning module around one model, whose runs resume exactly.

    Attributes:
        model: Model to train; set by the subclass.
        tokens_seen: Training tokens of all processes so far.

    Args:
        optimizer: Creates the optimizer from parameter groups: matrices, and norms and biases without decay. None means
            AdamW with learning rate 1e-3, betas 0.9 and 0.95 and weight decay 0.1.
        scheduler: Creates the schedule from the optimizer; stepped every optimizer step. Defaults to ``WarmupCosine``.
            None means a constant rate.
        gate_lr_multiplier: Factor of the learning rate of memories' gates, shares and log-weights, which have no weight
            decay. Defaults to 1, which measured best on books; more opens gates that begin closed sooner.
        distillation: Teacher and losses to train with, in addition to or instead of the labels; ``SelfDistillation``
            teaches a memory the model's attention over a whole batch. None disables it.
    """

    model: pretrained.PretrainedModel

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = WarmupCosine,
        distillation: Distillation | None = None,
        gate_lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 < gate_lr_multiplier < math.inf:
            raise MemtxError(f"gate_lr_multiplier is {gate_lr_multiplier}, expected a positive number.", "1 is off.")
        self.gate_lr_multiplier = gate_lr_multiplier
        self.distillation = distillation
        self.make_optimizer = optimizer if optimizer is not None else default_optimizer
        self.make_scheduler = scheduler
        self.tokens_seen = 0
        self.picture_sums: dict[str, Tensor] | None = None
        self._resume_state: dict[str, Any] | None = None
        self._total_steps = 0

    def rank_state(self) -> dict[str, Any]:
        """Return the state of this process for a checkpoint, as tensors and plain values."""
        return {}

    def restore_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore what :meth:`rank_state` returned on each process of the checkpoint; their number may differ."""

    def step_state(self) -> dict[str, Any]:
        """Return what a training step changes besides weights and random state, without copies of tensors."""
        return {"tokens_seen": self.tokens_seen}

    def restore_step_state(self, state: dict[str, Any]) -> None:
        """Go back to what :meth:`step_state` returned."""
        self.tokens_seen = state["tokens_seen"]

    # Steps

    def setup(self, stage: str) -> None:
        """Check the trainer's options and load the teacher when training begins."""
        if stage == "fit":
            preflight.check_numbers(self.trainer)
        if stage == "fit" and self.distillation is not None:
            if self.distillation.uses_cache and self.trainer.world_size > 1:
                raise MemtxError(
                    f"distillation.cache_dir works with one process, this run has {self.trainer.world_size}.",
                    "Remove cache_dir, or train with one process.",
                )
            self.distillation.setup(self.model, self.datamodule)

    @abstractmethod
    def evaluate_batch(self, stage: str, batch: Any, batch_idx: int) -> None:
        """Update and log the metrics of a stage, "val" or "test"."""

    def log_at_epoch_end(self, stage: str) -> None:
        """Log the metrics that :meth:`evaluate_batch` does not; a subclass may override it."""

    def add_to_picture(self, name: str, sums: Tensor) -> None:
        """Add the sums of a batch, always of the same shape, to those that a picture of the validation is drawn from.

        For ``ValidationPictures``, which sets ``picture_sums`` during a validation; None otherwise.
        """
        if self.picture_sums is not None:
            self.picture_sums[name] = self.picture_sums[name] + sums if name in self.picture_sums else sums

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a validation batch."""
        self.evaluate_batch("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a test batch."""
        self.evaluate_batch("test", batch, batch_idx)

    @property
    def datamodule(self) -> Any:
        """The trainer's data module, None without one."""
        return getattr(self.trainer, "datamodule", None)

    @property
    def progress(self) -> float:
        """Fraction of the run's optimizer steps that are done; 0 if their number is unknown."""
        return self.trainer.global_step / self._total_steps if self._total_steps else 0.0

    def _distillation_loss(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the sum of the distillation losses and log each."""
        assert self.distillation is not None
        losses = self.distillation.compute_losses(student, teacher, self.progress)
        for name, value in losses.items():
            self.log(f"train_{name}", value.detach())
        return torch.stack(list(losses.values())).sum()

    def _log_training_step(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Count the tokens of a training step, log its loss and return it."""
        self.tokens_seen += tokens.numel() * self.trainer.world_size
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    # Model, optimizer and schedule

    def configure_model(self) -> None:
        """Shard the model under a strategy that does so; idempotent. Raises MemtxError if the module distills."""
        if self.device_mesh is not None and self.distillation is not None:
            raise MemtxError(
                "model.distillation does not support a strategy that shards the weights.",
                "Remove model.distillation, or use --trainer.strategy ddp.",
            )
        configure_sharding(self, self.model)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        # Computed before the data position is restored: see _compute_total_steps.
        self._total_steps = self._compute_total_steps() if self.distillation is not None else 0
        optimizer = build_optimizer(self.make_optimizer, self, multiplier := self.gate_lr_multiplier)
        preflight.allow_clipping(self.trainer, optimizer)
        make_scheduler = self.make_scheduler
        scheduler = None if make_scheduler is None else build_scheduler(make_scheduler, optimizer, self, multiplier)
        logged = {"train_loss", "train_bits_per_byte", *getattr(self, "metrics", ())}
        preflight.check_monitors(self.trainer, self, logged, scheduler)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps == 0:
            scheduler.total_steps = self._compute_total_steps()
        if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < (num_steps := self._compute_total_steps()):
            message = f"model.scheduler: OneCycleLR has {scheduler.total_steps} total_steps, the run {num_steps}."
            raise MemtxError(message, f"Set its total_steps to {num_steps}.")
        # Lightning would step a plateau schedule after every batch, with the metric of the last validation.
        config = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, except for ``ReduceLROnPlateau``, which is stepped after a validation."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def _step_plateau_schedule(self) -> None:
        """Step a ``ReduceLROnPlateau`` with its ``monitor``, by default the loss of validation or training."""
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        default = "val_loss" if preflight.has_validation(self.trainer) else "train_loss"
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                monitor = getattr(config.scheduler, "monitor", default)
                config.scheduler.step(self.trainer.callback_metrics[monitor])

    def on_validation_epoch_start(self) -> None:
        """Validate the average of the weights, if there is one."""
        averaging.swap_average(self.trainer, self)

    def on_validation_epoch_end(self) -> None:
        """Log metrics, step a plateau schedule, and train on."""
        self.log_at_epoch_end("val")
        self._step_plateau_schedule()
        averaging.swap_average(self.trainer, self)

    def on_test_epoch_end(self) -> None:
        """Log metrics."""
        self.log_at_epoch_end("test")

    def on_train_epoch_end(self) -> None:
        """Step a plateau schedule if the run does not validate."""
        if not preflight.has_validation(self.trainer):
            self._step_plateau_schedule()

    def _compute_total_steps(self) -> int:
        # Not trainer.estimated_stepping_batches: it sets up the loaders before the checkpoint's position is restored,
        # which is then lost (Lightning issue 20550).
        num_batches = math.inf
        if self.datamodule is not None and (self.trainer.max_epochs or -1) > 0:
            num_batches = count_limited(len(self.datamodule.train_dataloader()), self.trainer.limit_train_batches)
        return trainer_state.total_steps(self.trainer, num_batches) or 0

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's description, and the state and random state of each rank."""
        rank_state = {**self.rank_state(), "rng_state": rng.get_rng_state()}
        rank_states = [rank_state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank_states = [rank_state] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(rank_states, rank_state)
        checkpoint[pretrained.CHECKPOINT_KEY] = {
            "model": pretrained.describe_model(self.model),
            "lora": _lora_config(self.model),
            "ranks": rank_states,
            "tokens_seen": self.tokens_seen,
            # A run cannot resume exactly from the middle of an accumulation.
            "has_stepped": trainer_state.has_stepped(self.trainer),
        }
        averaging.save_average(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint's states for :meth:`on_train_start`; raises CheckpointError if it is of another model.

        Another program or format version counts as another model.
        """
        entry = checkpoint.get(pretrained.CHECKPOINT_KEY)
        if entry is None:
            raise CheckpointError("The checkpoint was not written by memtx.", "Use a checkpoint of a memtx run.")
        if self.distillation is None or not self.distillation.losses:
            # Trained projections of a student are useless without a teacher.
            weights = checkpoint.get("state_dict", {})  # absent from a sharded checkpoint
            for name in [name for name in weights if name.startswith(_DISTILLATION_PREFIX)]:
                del weights[name]
        if self._trainer is not None:
            adapt_to_checkpoint(self._trainer, self, checkpoint)
        _check_same_model(entry, self.model)
        averaging.load_trained_weights(self._trainer, checkpoint)
        self.tokens_seen = entry["tokens_seen"]
        self._resume_state = entry

    def on_train_start(self) -> None:
        """Restore the states of this rank: after setup, which draws random numbers."""
        trainer_state.sync_accumulation(self.trainer)
        if (entry := self._resume_state) is None:
            return
        self._resume_state = None
        ranks, rank = entry["ranks"], self.trainer.global_rank
        self.restore_rank_states(ranks)
        rng.set_rng_state(ranks[rank % len(ranks)]["rng_state"])
        if rank >= len(ranks):
            rng.reseed_for_rank(rank)
        trainer_state.sync_batch_progress(self.trainer)


def adapt_to_checkpoint(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Let callbacks that change the model in training bring it to a checkpoint's step (``on_load_model``)."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (on_load_model := getattr(callback, "on_load_model", None)) is not None:
            on_load_model(trainer, module, checkpoint)


def _lora_config(model: pretrained.PretrainedModel) -> dict[str, Any] | None:
    return None if model.adapter_config is None else model.adapter_config.to_dict()


def _check_same_model(entry: Mapping[str, Any], model: pretrained.PretrainedModel) -> None:
    """Raise CheckpointError unless memtx's entry in a checkpoint describes this model."""
    saved, current = entry["model"], pretrained.describe_model(model)
    if (version := saved.get("version")) != pretrained.FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint has format version {version}, this release reads {pretrained.FORMAT_VERSION}.",
            "Use the release that wrote it.",
        )
    if saved != current:
        old, new = saved.get("init_args", {}), current["init_args"]
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise CheckpointError(
            f"The checkpoint belongs to another model: {', '.join(changed) or 'its class'} differs.",
            "Use the config saved beside the checkpoint.",
        )
    if entry.get("lora") != _lora_config(model):
        raise CheckpointError(
            f"The checkpoint's LoRA is {entry.get('lora') or 'none'}, this run's {_lora_config(model) or 'none'}.",
            "Use the config saved beside the checkpoint.",
        )
