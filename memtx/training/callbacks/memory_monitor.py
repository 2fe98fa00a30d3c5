"""Monitors of a model's memory: norms of the state, closed gates, and the gain in validation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memtx.checkpoint import trainer_state
from memtx.errors import check_at_least
from memtx.memory.parts import Gate
from memtx.training.carry import get_carry

NUM_CHECKS = 5
"""Consecutive checks at which a problem must hold before a warning."""

MAX_GROWTH = 100.0
"""Growth from the first to the last of these checks; in layers that learn, it is about tenfold."""

MIN_GAIN = 1e-3
"""Gain in bits per byte below which memory counts as unused; seeds of equal runs differ by more."""


class MemoryNormMonitor(pl.Callback):
    """Logs ``memory_rms_N``, the root mean square of the state of layer N, and warns on stderr.

    A tensor of the state gets a warning if it was zero at 5 consecutive checks, or if it grew at each of them,
    a hundredfold in total. Models without a state log nothing.

    Args:
        every_n_batches: Training batches between two checks, each of which waits for the GPU.

    Raises:
        MemtxError: ``every_n_batches`` is below 1.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        check_at_least(1, every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self._rms_history: dict[str, list[float]] = {}
        self._warned: set[tuple[str, str]] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the state every ``every_n_batches`` batches."""
        if (batch_idx + 1) % self.every_n_batches or (carry := get_carry(pl_module)) is None:
            return
        layers: dict[str, list[tuple[float, int]]] = {}
        for name, (total, count) in sum_squares(carry.named_tensors("train")).items():
            layers.setdefault(name.partition("[")[2].partition("]")[0], []).append((total, count))
            self._check_history(trainer, name, math.sqrt(total / count))
        for layer, sums in layers.items():
            total, count = map(sum, zip(*sums, strict=True))
            pl_module.log(f"memory_rms_{layer}", math.sqrt(total / count), rank_zero_only=True)

    def _check_history(self, trainer: pl.Trainer, name: str, rms: float) -> None:
        history = self._rms_history.setdefault(name, [])
        history.append(rms)
        del history[:-NUM_CHECKS]
        if len(history) < NUM_CHECKS:
            return
        num_batches = self.every_n_batches * (NUM_CHECKS - 1)
        if not any(history):
            self._warn_once(
                trainer,
                (name, "empty"),
                f"{name} was zero at every check for {num_batches} batches: nothing is written to that memory. "
                "Documents may be shorter than the window before it, or a gate may be closed.",
            )
        has_grown = all(later > earlier for earlier, later in itertools.pairwise(history))
        if has_grown and history[0] > 0 and rms >= MAX_GROWTH * history[0]:
            self._warn_once(
                trainer,
                (name, "grows"),
                f"{name} grew from {history[0]:.3g} to {rms:.3g} (root mean square) in {num_batches} batches, and at "
                "every check in between: the memory adds without forgetting, or the learning rate is too high.",
            )

    def _warn_once(self, trainer: pl.Trainer, key: tuple[str, str], message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            trainer_state.write_status(trainer, f"Memory: {message}")


def sum_squares(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, int]]:
    """Return the sum of squares and the number of elements of every non-empty floating-point tensor, by name."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not tensors:
        return {}
    # Stacked, so that the GPU is waited for once.
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors.values()]).tolist()
    return {name: (norm**2, tensor.numel()) for norm, (name, tensor) in zip(norms, tensors.items(), strict=True)}


class ClosedGateMonitor(pl.Callback):
    """Logs ``val_closed_gate_fraction``, the fraction of gate values that were exactly zero in a validation.

    A closed gate leaves the memory bitwise unchanged. A run whose gates never close forgets on streams much longer than
    those of training, whatever its loss. Models without gates log nothing.
    """

    def __init__(self) -> None:
        self._hook_handles: list[RemovableHandle] = []
        self._gate_counts: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register hooks on all gates."""
        self._gate_counts = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        gates = [module for module in pl_module.modules() if isinstance(module, Gate)]
        self._hook_handles = [gate.register_forward_hook(self._count_closed) for gate in gates]

    def _count_closed(self, gate: nn.Module, inputs: Any, output: Tensor) -> None:
        assert self._gate_counts is not None
        self._gate_counts += torch.stack([(output == 0).sum(), torch.tensor(output.numel(), device=output.device)])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the fraction over all ranks."""
        if self._hook_handles and self._gate_counts is not None:
            rank_counts = pl_module.all_gather(self._gate_counts)
            assert isinstance(rank_counts, Tensor)
            num_closed, total = rank_counts.view(-1, 2).sum(0)
            pl_module.log("val_closed_gate_fraction", (num_closed / total.clamp(min=1)).float(), rank_zero_only=True)
        self._remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles = []


class UnusedMemoryWarning(pl.Callback):
    """Warns once if memory improved none of 5 validations in the second half of a run with ``measure_memory_gain``."""

    def __init__(self) -> None:
        self._num_without_gain = 0
        self._warned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare ``val_memory_gain`` with the smallest gain that counts."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        gain = float(trainer.callback_metrics.get("val_memory_gain", math.nan))
        self._num_without_gain = self._num_without_gain + 1 if gain < MIN_GAIN else 0
        is_early = trainer.global_step < (trainer_state.total_steps(trainer) or 0) / 2
        if self._num_without_gain < NUM_CHECKS or is_early or self._warned:
            return
        self._warned = True
        change = f"{-gain:.4f} better" if gain < 0 else f"only {gain:.4f} worse"
        trainer_state.write_status(
            trainer,
            f"The memory is not used: without it, the last {self._num_without_gain} validations are no "
            f"worse, this one {change} in bits per byte. Shorter segments, more bptt_segments or more steps may help.",
        )
