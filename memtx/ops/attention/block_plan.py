"""Which keys each block of queries is to meet, and the masks of those meetings; made once a visibility."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.ops.attention.bias import ScoreBias, compute_block_bias
from memtx.ops.attention.mask import Visibility, create_mask, find_key_ranges

BLOCK_SIZE = 128
"""Queries a block: measured fastest for forward and backward at window 512 on CPU."""

MAX_GAP = 160
"""Two ranges whose gap is at most this many keys go into one call; a further call costs about as much."""


@dataclass(frozen=True)
class Band:
    """One fused call: the queries [query_start, query_stop) against the keys [key_start, key_stop).

    Attributes:
        mask: (rows, 1 or heads, queries, keys), the additive mask in the scores' accumulation type.
        fully_masked: (rows, queries, 1 or heads) bool, queries that see none of the keys.
        has_bias: whether the mask holds more than 0 and minus infinity.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    mask: Tensor
    fully_masked: Tensor
    has_bias: bool


def split_queries(visibility: Visibility, block_size: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return for each block of queries its bounds and the ranges of keys it is to meet."""
    blocks = []
    for start in range(0, visibility.num_queries, block_size):
        stop = min(start + block_size, visibility.num_queries)
        joined: list[tuple[int, int]] = []
        for low, high in find_key_ranges(visibility, start, stop):
            if joined and low - joined[-1][1] <= MAX_GAP:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        blocks.append((start, stop, joined))
    return blocks


def create_additive_mask(
    visibility: Visibility,
    bias: ScoreBias | None,
    query_range: tuple[int, int],
    key_range: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return a block's mask and its blind queries, shaped as in :class:`Band`."""
    seen = create_mask(visibility, query_range, key_range)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + compute_block_bias(bias, query_range, key_range).to(dtype)
    return mask, ~seen.any(-1)[:, :, None]


def build_bands(visibility: Visibility, bias: ScoreBias | None, block_size: int, dtype: torch.dtype) -> list[Band]:
    """Return the fused calls of a whole segment; made once for all layers that share ``visibility``."""
    made = []
    for start, stop, parts in split_queries(visibility, block_size):
        for low, high in parts:
            mask, blind = create_additive_mask(visibility, bias, (start, stop), (low, high), dtype)
            made.append(Band(start, stop, low, high, mask, blind, bias is not None))
    return made
