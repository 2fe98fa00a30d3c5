"""What every training module does alike: optimiser and schedule, and what a checkpoint holds beside the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memtx.checkpoint import pretrained, rng
from memtx.errors import CheckpointError, MemtxError
from memtx.training.callbacks import trainer_state
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.model_outputs import ModelOutputs
from memtx.training.elastic_resume import sync_batch_progress
from memtx.training.fsdp import configure_sharding
from memtx.training.optimizers import WarmupCosine, make_param_groups

_DISTILLATION_PREFIX = "distillation."
"""What the names of a distillation's own weights begin with in a checkpoint."""


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) with the usual settings of language models."""
    return AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class BaseModule(pl.LightningModule):
    """A Lightning module around one model, which a run goes on with exactly.

    Attributes:
        model: a model that knows how it was made; set by the subclass.
        tokens_seen: in training, by all processes.

    Args:
        optimizer: makes the optimiser from parameter groups; None for AdamW (rate 1e-3, betas 0.9 and 0.95,
            decay 0.1). Norms and biases are in a group of their own without decay.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step; None for a constant rate.
        distillation: a teacher and what of it the model is to learn beside, or instead of, the labels; None for none.
    """

    model: pretrained.PretrainedModel

    def __init__(
        self,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self.make_optimizer = optimizer if optimizer is not None else default_optimizer
        self.make_scheduler = scheduler
        self.tokens_seen = 0
        self._resume_state: dict[str, Any] | None = None
        self._total_steps = 0

    def rank_state(self) -> dict[str, Any]:
        """Return what this process has to keep, as tensors and plain values."""
        return {}

    def restore_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Take what :meth:`rank_state` returned on every process of the checkpoint, however many there are now."""

    # Learning

    def configure_model(self) -> None:
        """Share the model out over the processes, under a strategy that does so; this may be asked again.

        Raises:
            MemtxError: it is to learn from a teacher, whose part in it is not shared out.
        """
        if self.device_mesh is not None and self.distillation is not None:
            raise MemtxError(
                "model.distillation does not go with a strategy that shares the weights out.",
                "Leave it out, or take --trainer.strategy ddp.",
            )
        configure_sharding(self, self.model)

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one and training begins."""
        if stage == "fit" and self.distillation is not None:
            if self.distillation.uses_cache and self.trainer.world_size > 1:
                raise MemtxError(
                    "A teacher's scores are kept by one process alone.", "Leave cache_dir out, or use one."
                )
            self.distillation.setup(self.model, getattr(self.trainer, "datamodule", None))

    @property
    def progress(self) -> float:
        """The share of the run's optimiser steps that is done; 0 where their number is not known."""
        return self.trainer.global_step / self._total_steps if self._total_steps else 0.0

    def _distillation_loss(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the sum of the losses of a distillation, and log each."""
        assert self.distillation is not None
        named = self.distillation.compute_losses(student, teacher, self.progress)
        for name, value in named.items():
            self.log(f"train_{name}", value.detach())
        return torch.stack(list(named.values())).sum()

    def _log_training_step(self, loss: Tensor, tokens: Tensor) -> Tensor:
        """Count and log a training step, and return its loss."""
        self.tokens_seen += tokens.numel() * self.trainer.world_size
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, stepped with it."""
        # Here, before the position in the data is restored: see _compute_total_steps.
        self._total_steps = self._compute_total_steps() if self.distillation is not None else 0
        optimizer = self.make_optimizer(make_param_groups(self))
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps == 0:
            scheduler.total_steps = self._compute_total_steps()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _compute_total_steps(self) -> int:
        # Not trainer.estimated_stepping_batches: it sets the loaders up before the checkpoint's position is
        # restored, which is then lost (Lightning issue 20550).
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not self.trainer.max_epochs or self.trainer.max_epochs < 0:
            return 0
        # An epoch's last batch is stepped on, however few were accumulated.
        return math.ceil(len(data.train_dataloader()) / self.trainer.accumulate_grad_batches) * self.trainer.max_epochs

    # What a checkpoint holds beside the weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's description, and of every rank its state and the random states."""
        own = {**self.rank_state(), "rng_state": rng.get_rng_state()}
        ranks = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, own)
        checkpoint[pretrained.CHECKPOINT_KEY] = {
            "model": pretrained.describe_model(self.model),
            "lora": self._lora_config_dict(),
            "ranks": ranks,
            "tokens_seen": self.tokens_seen,
            # Whether a run can go on from it exactly: it cannot in the middle of an accumulation.
            "has_stepped": trainer_state.has_stepped(self.trainer),
        }

    def _lora_config_dict(self) -> dict[str, Any] | None:
        return None if self.model.adapter_config is None else self.model.adapter_config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, if training goes on."""
        if pretrained.CHECKPOINT_KEY not in checkpoint:
            raise CheckpointError("The checkpoint is of something else.", "Give one that memtx wrote.")
        if self.distillation is None or not self.distillation.losses:
            # Maps that learn with a student: of no use where no teacher is.
            weights = checkpoint.get("state_dict", {})  # shares of several processes are read apart
            for name in [name for name in weights if name.startswith(_DISTILLATION_PREFIX)]:
                del weights[name]
        kept = checkpoint[pretrained.CHECKPOINT_KEY]
        if (version := kept["model"].get("version")) != pretrained.FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint has format version {version}, this release reads {pretrained.FORMAT_VERSION}.",
                "Use the release that wrote it.",
            )
        if kept["model"] != (own := pretrained.describe_model(self.model)):
            changed = sorted(
                key
                for key in {*kept["model"].get("init_args", {}), *own["init_args"]}
                if kept["model"].get("init_args", {}).get(key) != own["init_args"].get(key)
            )
            raise CheckpointError(
                f"The checkpoint is of another model: {', '.join(changed) or 'its class'} differs.",
                "Use the config saved beside the checkpoint.",
            )
        if kept.get("lora") != self._lora_config_dict():
            raise CheckpointError(
                f"The checkpoint's LoRA is {kept.get('lora') or 'none'}, "
                f"this run's {self._lora_config_dict() or 'none'}.",
                "Use the config saved beside the checkpoint.",
            )
        self.tokens_seen = kept["tokens_seen"]
        self._resume_state = kept

    def on_train_start(self) -> None:
        """Put the random states back: later than loading, since setting up draws numbers."""
        if (kept := self._resume_state) is None:
            return
        self._resume_state = None
        ranks, rank = kept["ranks"], self.trainer.global_rank
        self.restore_rank_states(ranks)
        rng.set_rng_state(ranks[rank % len(ranks)]["rng_state"])
        if rank >= len(ranks):
            rng.reseed_for_rank(rank)
        sync_batch_progress(self.trainer)
