"""Additive score biases that are functions of distance: linear (ALiBi), or learned by a table (T5, Transformer-XL).

Distance is the query's tick minus the key's: positive for the past.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


# Equal only to itself: backends keep what they make of it under the object as key.
@dataclass(frozen=True, eq=False)
class AlibiBias:
    """A penalty that grows linearly with distance (ALiBi, Press et al. 2022, section 3).

    Make one for all layers that share a visibility: what a backend makes of it is made once an object.

    Attributes:
        slopes: (heads,), the penalty for each tick of distance.
        key_offset: (rows, keys), where each key stands; rows may be 1.
    """

    slopes: Tensor
    key_offset: Tensor

    @property
    def weight(self) -> Tensor:
        """(heads, ...): what may learn."""
        return self.slopes

    def compute_bias(self, distance: Tensor) -> Tensor:
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
        key_offset: (rows, keys), where each key stands; rows may be 1. A fraction of a distance is rounded down.
        min_distance: the distance of column 0, or of entry 0 of ``buckets``; farther ones, either way, take the last.
        buckets: (distances,) int64, the column of each distance from ``min_distance`` on; None for one column each.
    """

    table: Tensor
    key_offset: Tensor
    min_distance: int = 0
    buckets: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(heads, ...): what may learn."""
        return self.table

    def compute_bias(self, distance: Tensor) -> Tensor:
        """Return the bias (rows, heads, ...) of distances (rows, 1 or heads, ...)."""
        distances = self.table.shape[1] if self.buckets is None else self.buckets.shape[0]
        index = (distance.floor().to(torch.int64) - self.min_distance).clamp(0, distances - 1)
        if self.buckets is not None:
            index = self.buckets[index]
        heads = torch.arange(self.table.shape[0], device=index.device)
        return self.table[heads.view(-1, *(1,) * (distance.dim() - 2)), index]


ScoreBias = AlibiBias | RelativeBias


def slice_bias(bias: ScoreBias | None, start: int, stop: int | None) -> ScoreBias | None:
    """Return the bias of the keys [start, stop) alone."""
    return None if bias is None else replace(bias, key_offset=bias.key_offset[:, start:stop])


def bias_requires_grad(bias: ScoreBias | None) -> bool:
    """Return whether a gradient of the bias is asked for."""
    return bias is not None and bias.weight.requires_grad and torch.is_grad_enabled()


def compute_block_bias(bias: ScoreBias, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
    """Return the bias of a block as (rows, heads, queries, keys)."""
    tick = torch.arange(*query_range, device=bias.key_offset.device, dtype=bias.key_offset.dtype)
    distance = tick[None, :, None] - bias.key_offset[:, None, key_range[0] : key_range[1]]
    return bias.compute_bias(distance[:, None])
