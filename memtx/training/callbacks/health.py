"""How large what the memories hold is, layer by layer, and in words when it grows without bound or stays empty."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from memtx.errors import check_at_least
from memtx.training.callbacks import trainer_state
from memtx.training.carry import get_carry

NUM_CHECKS = 5
"""Looks in a row at which something has to be so before it is said."""

MAX_GROWTH = 100.0
"""From the least of the last looks to the newest: layers that learn grow some tenfold over as many steps."""


class MemoryNormMonitor(pl.Callback):
    """Logs ``memory_rms_N``, the root mean square of the numbers that layer N's memories carry, and warns on stderr.

    A part of the state, such as a bank, is named when it was nothing but zeros at 5 looks in a row, or when it grew at
    each of 5 looks in a row, a hundredfold in all. Models that carry nothing log nothing.

    Args:
        every_n_batches: training batches between two looks, each of which waits for the GPU.

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
        """Look, from time to time."""
        if (batch_idx + 1) % self.every_n_batches or (carry := get_carry(pl_module)) is None:
            return
        sizes = sum_squares(carry.named_tensors("train"))
        layers: dict[str, list[tuple[float, int]]] = {}
        for name, found in sizes.items():
            layers.setdefault(name.partition("[")[2].partition("]")[0], []).append(found)
            self._check_history(trainer, name, math.sqrt(found[0] / found[1]))
        for layer, parts in layers.items():
            total, count = map(sum, zip(*parts, strict=True))
            pl_module.log(f"memory_rms_{layer}", math.sqrt(total / count), rank_zero_only=True)

    def _check_history(self, trainer: pl.Trainer, name: str, rms: float) -> None:
        seen = self._rms_history.setdefault(name, [])
        seen.append(rms)
        del seen[:-NUM_CHECKS]
        if len(seen) < NUM_CHECKS:
            return
        steps = self.every_n_batches * (NUM_CHECKS - 1)
        if not any(seen):
            self._warn_once(
                trainer,
                (name, "empty"),
                f"{name} was zero at every look for {steps} batches: nothing is written to that memory. Documents may "
                "be shorter than what stands before it, or a gate may be closed.",
            )
        rises = all(later > earlier for earlier, later in itertools.pairwise(seen))
        if rises and seen[0] > 0 and rms >= MAX_GROWTH * seen[0]:
            self._warn_once(
                trainer,
                (name, "grows"),
                f"{name} grew from {seen[0]:.3g} to {rms:.3g} (root mean square) in {steps} batches, and at every look "
                "in between: a memory that adds without forgetting, or a rate that is too high.",
            )

    def _warn_once(self, trainer: pl.Trainer, key: tuple[str, str], message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            trainer_state.write_status(trainer, f"Memory: {message}")


def sum_squares(tensors: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
    """Return, by key path, the sum of squares and the count of the numbers of every part of a state that has some."""
    real = {name: one for name, one in tensors.items() if one.is_floating_point() and one.numel()}
    if not real:
        return {}
    # One wait for all of them.
    norms = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in real.values()]).tolist()
    return {name: (norm**2, one.numel()) for norm, (name, one) in zip(norms, real.items(), strict=True)}
