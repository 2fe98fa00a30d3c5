"""Optimizer defaults, weight decay groups and the default schedule."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.optim import LBFGS, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR

from memtx.errors import MemtxError, check_at_least, check_positive, check_probability
from memtx.training.muon import add_adamw

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) with the usual settings of language models."""
    return AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def find_gates(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that modules name in ``gate_parameters``: gates, shares and log-weights of memories."""
    parts = [getattr(module, name) for module in model.modules() for name in getattr(module, "gate_parameters", ())]
    return {
        parameter
        for part in parts
        if part is not None
        for parameter in (part.parameters() if isinstance(part, nn.Module) else (part,))
    }


def make_param_groups(model: nn.Module, *, separate_gates: bool = False) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: matrices, and without decay the rest (norms, biases, gates).

    ``separate_gates`` makes a group of the gates alone, the last one.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gates = find_gates(model)
    parts: list[list[nn.Parameter]] = [[], [], []]
    for parameter in trainable:
        is_gate = parameter in gates
        parts[2 if is_gate and separate_gates else int(is_gate or parameter.dim() < 2)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parts[0]},
        *({"params": part, "weight_decay": 0.0} for part in parts[1:]),
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(make_optimizer: OptimizerFactory, model: nn.Module, gate_lr_multiplier: float = 1.0) -> Optimizer:
    """Return the optimizer of a model's parameters, in which gates have a multiple of the learning rate.

    ``torch.optim.Muon`` is given an AdamW for the parameters that it cannot take.
    """
    # Of one matrix, which every optimizer takes.
    kind = make_optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    if isinstance(kind, LBFGS):
        reason = "torch.optim.LBFGS reads a batch several times per step, and the memory would advance every time."
        raise MemtxError(reason, "Choose another model.optimizer, such as torch.optim.AdamW or torch.optim.Muon.")
    groups = make_param_groups(model, separate_gates=gate_lr_multiplier != 1.0)
    if isinstance(kind, Muon):
        optimizer = add_adamw(cast(Callable[[Any], Muon], make_optimizer), model, groups, find_gates(model))
    else:
        optimizer = make_optimizer(groups)
    for group in _gate_groups(optimizer, model, gate_lr_multiplier):
        group["lr"] = group["lr"] * gate_lr_multiplier
    return optimizer


def build_scheduler(
    make_scheduler: SchedulerFactory, optimizer: Optimizer, model: nn.Module, gate_lr_multiplier: float = 1.0
) -> LRScheduler:
    """Return the schedule of an optimizer from :func:`build_optimizer`, which keeps the gates' multiple."""
    scheduler = make_scheduler(optimizer)
    if isinstance(scheduler, OneCycleLR | CyclicLR):
        # These set the rates of all groups alike, whatever the optimizer's are.
        for group in _gate_groups(optimizer, model, gate_lr_multiplier):
            for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                group[key] *= gate_lr_multiplier
            if isinstance(scheduler, CyclicLR):
                index = optimizer.param_groups.index(group)
                scheduler.base_lrs[index] *= gate_lr_multiplier
                scheduler.max_lrs[index] *= gate_lr_multiplier
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    return scheduler


def _gate_groups(optimizer: Optimizer, model: nn.Module, gate_lr_multiplier: float) -> list[dict[str, Any]]:
    """Return the groups of gates, none if they are no groups of their own."""
    gates = find_gates(model) if gate_lr_multiplier != 1.0 else set()
    return [group for group in optimizer.param_groups if group["params"][0] in gates]


def find_phase(steps: Sequence[int], step: int) -> tuple[int, int]:
    """Return the phase of a training step, and the step at which it begins; the last phase does not end."""
    phase_starts = [0, *itertools.accumulate(steps[:-1])]
    phase = bisect.bisect_right(phase_starts, step) - 1
    return phase, phase_starts[phase]


class _Schedule(LambdaLR):
    """Base of schedules by step, whose checkpoints hold no settings, so that a run can resume with other ones."""

    settings: ClassVar[tuple[str, ...]]
    """Names of the attributes that hold settings."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, self._lr_scale)

    def _lr_scale(self, step: int) -> float:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the progress."""
        return {key: value for key, value in super().state_dict().items() if key not in self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the progress."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in self.settings})


class PhasedWarmup(_Schedule):
    """Constant rates by phase of training, each after a linear warm-up (Longformer, Beltagy et al. 2020, appendix B).

    Args:
        optimizer: Optimizer whose learning rates are scaled.
        steps: Optimizer steps of each phase; the last one lasts to the end of the run.
        factor: Factor of the rate from phase to phase. Defaults to 0.5.
        warmup_fraction: Fraction of a phase's steps until its full rate. Defaults to 0.1.
        max_warmup_steps: Steps of a warm-up at most. Defaults to 10,000.

    Raises:
        MemtxError: A number is out of range.
    """

    settings = ("_phase_steps", "_factor", "_warmup_steps")

    def __init__(
        self,
        optimizer: Optimizer,
        steps: Sequence[int],
        factor: float = 0.5,
        warmup_fraction: float = 0.1,
        max_warmup_steps: int = 10_000,
    ) -> None:
        for number in steps or (0,):
            check_at_least(1, steps=number)
        check_positive(factor=factor)
        check_at_least(0, max_warmup_steps=max_warmup_steps)
        check_probability(warmup_fraction=warmup_fraction)
        self._phase_steps, self._factor = tuple(steps), factor
        self._warmup_steps = [min(int(warmup_fraction * number), max_warmup_steps) for number in steps]
        super().__init__(optimizer)

    def _lr_scale(self, step: int) -> float:
        phase, start = find_phase(self._phase_steps, step)
        warmup = self._warmup_steps[phase]
        return self._factor**phase * (min(1.0, (step - start + 1) / warmup) if warmup else 1.0)


class WarmupCosine(_Schedule):
    """Linear warm-up, then half a cosine down to a minimum (SGDR, Loshchilov and Hutter 2017, section 3).

    Args:
        optimizer: Optimizer whose learning rates are scaled.
        warmup_steps: Optimizer steps until the full rate. Defaults to 100.
        total_steps: Optimizer steps until the minimum; 0 means those of the run.
        min_lr_ratio: Minimum rate as a fraction of the full one. Defaults to 0.1.

    Raises:
        MemtxError: A number is out of range.
    """

    settings: ClassVar[tuple[str, ...]] = ("warmup_steps", "total_steps", "min_lr_ratio")

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 100, total_steps: int = 0, min_lr_ratio: float = 0.1
    ) -> None:
        if warmup_steps < 0 or total_steps < 0 or not 0.0 <= min_lr_ratio <= 1.0:
            raise MemtxError(
                f"The schedule has warmup_steps={warmup_steps}, total_steps={total_steps}, "
                f"min_lr_ratio={min_lr_ratio}.",
                "Choose steps of at least 0 and a min_lr_ratio from 0 to 1.",
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr_ratio = min_lr_ratio
        super().__init__(optimizer)

    def _lr_scale(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps <= self.warmup_steps:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self._decay(progress)

    def _decay(self, progress: float) -> float:
        """Return the rate after the warm-up, from 1 at progress 0 to 0 at 1."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupLinear(WarmupCosine):
    """Linear warm-up, then a line down to a minimum (BERT, Devlin et al. 2019, appendix A.2).

    Args:
        optimizer: Optimizer whose learning rates are scaled.
        warmup_steps: Optimizer steps until the full rate. Defaults to 100.
        total_steps: Optimizer steps until the minimum; 0 means those of the run.
        min_lr_ratio: Minimum rate as a fraction of the full one. Defaults to 0.0.

    Raises:
        MemtxError: A number is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 100, total_steps: int = 0, min_lr_ratio: float = 0.0
    ) -> None:
        super().__init__(optimizer, warmup_steps, total_steps, min_lr_ratio)

    def _decay(self, progress: float) -> float:
        return 1.0 - progress


class StagedLinear(WarmupCosine):
    """A constant rate, then a second stage that begins as a run of its own: warm-up, line to 0, fresh optimizer state.

    The schedules of TinyBERT's task distillation (Jiao et al. 2020, section 4.2, and ``task_distill.py`` of the
    authors' code), which trains layers in one run and predictions in the next.

    Args:
        optimizer: Optimizer whose learning rates are scaled.
        second_stage: Fraction of the run's steps at which the second stage begins, as ``end`` and ``begin`` of
            distillation losses. Defaults to 0.87.
        lr_ratio: Full rate of the second stage as a fraction of the first one's. Defaults to 0.6.
        warmup_fraction: Fraction of the second stage's steps until that rate. Defaults to 0.1.
        total_steps: Optimizer steps of both; 0 means those of the run.

    Raises:
        MemtxError: A number is out of range.
    """

    settings = (*WarmupCosine.settings, "second_stage", "lr_ratio", "warmup_fraction")

    def __init__(
        self,
        optimizer: Optimizer,
        second_stage: float = 0.87,
        lr_ratio: float = 0.6,
        warmup_fraction: float = 0.1,
        total_steps: int = 0,
    ) -> None:
        check_probability(second_stage=second_stage, warmup_fraction=warmup_fraction)
        check_positive(lr_ratio=lr_ratio)
        self.second_stage, self.lr_ratio, self.warmup_fraction = second_stage, lr_ratio, warmup_fraction
        super().__init__(optimizer, 0, total_steps)

    def _second_stage_step(self, step: int) -> int:
        """Return the number of a step in the second stage, negative before it."""
        first = math.ceil(self.second_stage * self.total_steps)
        return step - first if self.total_steps else -1

    def _lr_scale(self, step: int) -> float:
        if (position := self._second_stage_step(step)) < 0:
            return 1.0
        length = self.total_steps + position - step
        if position < (warmup := int(self.warmup_fraction * length)):
            return self.lr_ratio * (position + 1) / warmup
        return self.lr_ratio * max(0.0, (length - position) / max(1, length - warmup))

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next step, and drop the optimizer's state if it begins the second stage."""
        super().step(epoch)
        if self._second_stage_step(self.last_epoch) == 0:
            self.optimizer.state.clear()


class WarmupInverseSqrt(_Schedule):
    """Linear warm-up, then a rate that falls with the square root of the step (Vaswani et al. 2017, section 5.3).

    Args:
        optimizer: Optimizer whose learning rates, those at the end of the warm-up, are scaled.
        warmup_steps: Optimizer steps until the full rate. Defaults to 4,000.

    Raises:
        MemtxError: warmup_steps is below 1.
    """

    settings = ("warmup_steps",)

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 4000) -> None:
        check_at_least(1, warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def _lr_scale(self, step: int) -> float:
        return min((step + 1) / self.warmup_steps, math.sqrt(self.warmup_steps / max(step + 1, 1)))
