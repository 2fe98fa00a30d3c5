"""Which keys each block of queries is to meet, and the masks of those meetings; made once a visibility."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.ops.attention.bias import ScoreBias, bias_of
from memtx.ops.visibility import Visibility, ranges, visible

BLOCK = 128
"""Queries a block: measured fastest for forward and backward at window 512 on CPU."""

GAP = 160
"""Two ranges whose gap is at most this many keys go into one call; a further call costs about as much."""


@dataclass(frozen=True)
class Band:
    """One fused call: the queries [start, stop) against the keys [low, high).

    Attributes:
        mask: (rows, 1 or heads, queries, keys), the additive mask in the scores' accumulation type.
        blind: (rows, queries, 1 or heads) bool, queries that see none of the keys.
        biased: whether the mask holds more than 0 and minus infinity.
    """

    start: int
    stop: int
    low: int
    high: int
    mask: Tensor
    blind: Tensor
    biased: bool


def cut(visibility: Visibility, block: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return for each block of queries its bounds and the ranges of keys it is to meet."""
    blocks = []
    for start in range(0, visibility.queries, block):
        stop = min(start + block, visibility.queries)
        joined: list[tuple[int, int]] = []
        for low, high in ranges(visibility, start, stop):
            if joined and low - joined[-1][1] <= GAP:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        blocks.append((start, stop, joined))
    return blocks


def additive_mask(
    visibility: Visibility,
    bias: ScoreBias | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return a block's mask and its blind queries, shaped as in :class:`Band`."""
    seen = visible(visibility, queries, keys)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + bias_of(bias, queries, keys).to(dtype)
    return mask, ~seen.any(-1)[:, :, None]


def bands(visibility: Visibility, bias: ScoreBias | None, block: int, dtype: torch.dtype) -> list[Band]:
    """Return the fused calls of a whole segment; made once for all layers that share ``visibility``."""
    made = []
    for start, stop, parts in cut(visibility, block):
        for low, high in parts:
            mask, blind = additive_mask(visibility, bias, (start, stop), (low, high), dtype)
            made.append(Band(start, stop, low, high, mask, blind, bias is not None))
    return made
