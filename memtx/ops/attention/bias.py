"""Additive score biases that are functions of distance: linear (ALiBi), or learned by a table (T5, Transformer-XL).

Distance is the query's tick minus the key's: positive for the past.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


# Equal only to itself: backends keep what they make of it under the object as key.
@dataclass(frozen=True, eq=False)
class Bias:
    """A penalty that grows linearly with distance (ALiBi, Press et al. 2022, section 3).

    Make one for all layers that share a visibility: what a backend makes of it is made once an object.

    Attributes:
        slopes: (heads,), the penalty for each tick of distance.
        tick: (rows, keys), where each key stands; rows may be 1.
    """

    slopes: Tensor
    tick: Tensor

    @property
    def weight(self) -> Tensor:
        """(heads, ...): what may learn."""
        return self.slopes

    def score(self, distance: Tensor) -> Tensor:
        """Return the bias (rows, heads, ...) of distances (rows, 1 or heads, ...)."""
        slopes = self.slopes.to(distance.dtype)
        return -slopes.view(-1, *(1,) * (distance.dim() - 2)) * distance


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A learned number for each head and distance (T5, Raffel et al. 2020, section 2.1).

    By a column for each distance it is also the term of Transformer-XL that no query takes part in (Dai et al.
    2019, section 3.3, term d).

    Attributes:
        table: (heads, columns).
        tick: (rows, keys), where each key stands; rows may be 1. A fraction of a distance is rounded down.
        lowest: the distance of column 0, or of entry 0 of ``buckets``; farther ones, either way, take the last.
        buckets: (distances,) int64, the column of each distance from ``lowest`` on; None for one column each.
    """

    table: Tensor
    tick: Tensor
    lowest: int = 0
    buckets: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(heads, ...): what may learn."""
        return self.table

    def score(self, distance: Tensor) -> Tensor:
        """Return the bias (rows, heads, ...) of distances (rows, 1 or heads, ...)."""
        distances = self.table.shape[1] if self.buckets is None else self.buckets.shape[0]
        index = (distance.floor().to(torch.int64) - self.lowest).clamp(0, distances - 1)
        if self.buckets is not None:
            index = self.buckets[index]
        heads = torch.arange(self.table.shape[0], device=index.device)
        return self.table[heads.view(-1, *(1,) * (distance.dim() - 2)), index]


ScoreBias = Bias | RelativeBias


def cut(bias: ScoreBias | None, start: int, stop: int | None) -> ScoreBias | None:
    """Return the bias of the keys [start, stop) alone."""
    return None if bias is None else replace(bias, tick=bias.tick[:, start:stop])


def learns(bias: ScoreBias | None) -> bool:
    """Return whether a gradient of the bias is asked for."""
    return bias is not None and bias.weight.requires_grad and torch.is_grad_enabled()


def bias_of(bias: ScoreBias, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Return the bias of a block as (rows, heads, queries, keys)."""
    tick = torch.arange(*queries, device=bias.tick.device, dtype=bias.tick.dtype)
    distance = tick[None, :, None] - bias.tick[:, None, keys[0] : keys[1]]
    return bias.score(distance[:, None])
