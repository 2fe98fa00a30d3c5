"""Additive score biases that are functions of distance, such as ALiBi."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.ops.visibility import Visibility


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


def bias_of(bias: Bias, visibility: Visibility, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """Return the bias of a block as (rows, heads, queries, keys)."""
    tick = torch.arange(*queries, device=bias.tick.device, dtype=bias.tick.dtype)
    distance = tick[None, :, None] - bias.tick[:, None, keys[0] : keys[1]]
    return -bias.slopes.to(bias.tick.dtype)[None, :, None, None] * distance[:, None]
