"""How large what the memories hold is, layer by layer, and in words when it grows without bound or stays empty."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from memtx.errors import at_least
from memtx.training.callbacks import moments
from memtx.training.carry import carry_of

LOOKS = 5
"""Looks in a row at which something has to be so before it is said."""

GROWTH = 100.0
"""From the least of the last looks to the newest: layers that learn grow some tenfold over as many steps."""


class MemoryHealth(pl.Callback):
    """Logs ``memory_rms_N``, the root mean square of the numbers that layer N's memories carry, and warns on stderr.

    A part of the state, such as a bank, is named when it was nothing but zeros at 5 looks in a row, or when it grew at
    each of 5 looks in a row, a hundredfold in all. Models that carry nothing log nothing.

    Args:
        every: training batches between two looks, each of which waits for the GPU.

    Raises:
        MemtxError: ``every`` is below 1.
    """

    def __init__(self, every: int = 50) -> None:
        at_least(1, every=every)
        self.every = every
        self._seen: dict[str, list[float]] = {}
        self._said: set[tuple[str, str]] = set()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, from time to time."""
        if (batch_idx + 1) % self.every or (carry := carry_of(pl_module)) is None:
            return
        sizes = squares(carry.tensors("train"))
        layers: dict[str, list[tuple[float, int]]] = {}
        for name, found in sizes.items():
            layers.setdefault(name.partition("[")[2].partition("]")[0], []).append(found)
            self._compare(trainer, name, math.sqrt(found[0] / found[1]))
        for layer, parts in layers.items():
            total, count = map(sum, zip(*parts, strict=True))
            pl_module.log(f"memory_rms_{layer}", math.sqrt(total / count), rank_zero_only=True)

    def _compare(self, trainer: pl.Trainer, name: str, now: float) -> None:
        seen = self._seen.setdefault(name, [])
        seen.append(now)
        del seen[:-LOOKS]
        if len(seen) < LOOKS:
            return
        steps = self.every * (LOOKS - 1)
        if not any(seen):
            self._say(
                trainer,
                (name, "empty"),
                f"{name} was zero at every look for {steps} batches: nothing is written to that memory. Documents may "
                "be shorter than what stands before it, or a gate may be closed.",
            )
        rises = all(later > earlier for earlier, later in itertools.pairwise(seen))
        if rises and seen[0] > 0 and now >= GROWTH * seen[0]:
            self._say(
                trainer,
                (name, "grows"),
                f"{name} grew from {seen[0]:.3g} to {now:.3g} (root mean square) in {steps} batches, and at every look "
                "in between: a memory that adds without forgetting, or a rate that is too high.",
            )

    def _say(self, trainer: pl.Trainer, what: tuple[str, str], text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            moments.say(trainer, f"Memory: {text}")


def squares(tensors: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
    """Return, by key path, the sum of squares and the count of the numbers of every part of a state that has some."""
    real = {name: one for name, one in tensors.items() if one.is_floating_point() and one.numel()}
    if not real:
        return {}
    # One wait for all of them.
    norms = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in real.values()]).tolist()
    return {name: (norm**2, one.numel()) for norm, (name, one) in zip(norms, real.items(), strict=True)}
