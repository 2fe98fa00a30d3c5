"""The keys that each block of queries meets: as calls with masks, and as tables that kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from memtx.ops.attention.bias import ScoreBias, compute_block_bias
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask, find_key_bounds, find_key_ranges

BLOCK_SIZE = 128
"""Queries per block: fastest for forward and backward at window 512 on the CPU."""

MAX_GAP = 160
"""Maximum number of keys between two ranges that are merged into one call; another call costs about as much."""

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Band:
    """One fused call: the queries [query_start, query_stop) and the keys [key_start, key_stop).

    Attributes:
        mask: ``(batch or 1, heads or 1, queries, keys)``, the additive mask in the dtype of the scores.
        fully_masked: ``(batch or 1, queries, heads or 1)`` bool, True for queries that see none of the keys.
        has_bias: If True, the mask holds other values than 0 and minus infinity.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    mask: Tensor
    fully_masked: Tensor
    has_bias: bool


def split_queries(visibility: Visibility, block_size: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return the bounds of each block of queries and the ranges of keys it meets."""
    blocks = []
    for start in range(0, visibility.num_queries, block_size):
        stop = min(start + block_size, visibility.num_queries)
        merged: list[tuple[int, int]] = []
        for low, high in find_key_ranges(visibility, start, stop):
            if merged and low - merged[-1][1] <= MAX_GAP:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        blocks.append((start, stop, merged))
    return blocks


def create_additive_mask(
    visibility: Visibility, bias: ScoreBias | None, query_range: tuple[int, int], key_range: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a block's mask and fully masked queries, with the shapes of :class:`Band`."""
    visible = create_mask(visibility, query_range, key_range)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + compute_block_bias(bias, query_range, key_range).to(dtype)
    return mask, ~visible.any(-1)[:, :, None]


def build_bands(visibility: Visibility, bias: ScoreBias | None, block_size: int, dtype: torch.dtype) -> list[Band]:
    """Return the fused calls of a segment."""
    bands = []
    for start, stop, key_ranges in split_queries(visibility, block_size):
        for low, high in key_ranges:
            mask, fully_masked = create_additive_mask(visibility, bias, (start, stop), (low, high), dtype)
            bands.append(Band(start, stop, low, high, mask, fully_masked, bias is not None))
    return bands


@lru_cache(maxsize=64)
def build_key_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return ``(query blocks, key ranges, 2)`` int32: the keys [low, high) that each block of queries may see."""
    starts = range(0, num_queries, block_size)
    table = [find_key_bounds(key_ranges, start, min(start + block_size, num_queries)) for start in starts]
    return torch.tensor(table, dtype=torch.int32).view(-1, len(key_ranges), 2).to(device)


@lru_cache(maxsize=64)
def build_query_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return ``(key blocks, 4)`` int32: keys [low, high) of one key range, and the queries [start, stop) they meet."""
    table, first_key = [], 0
    for key_range in key_ranges:
        for low in range(0, key_range.num_keys, block_size):
            high = min(low + block_size, key_range.num_keys)
            queries = key_range.find_attending_queries(low, high, num_queries)
            table.append((first_key + low, first_key + high, *queries))
        first_key += key_range.num_keys
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device)


def get_int32_bounds(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Return both ends of the intervals as ``(batch or 1, keys)`` int32; offsets of a call are far below 2^31."""

    def convert(bound: Tensor) -> Tensor:
        return bound.clamp(-INT32_MAX, INT32_MAX).to(torch.int32).contiguous()

    return visibility.memo(
        "int32_bounds", lambda: (convert(visibility.visible_from), convert(visibility.visible_until))
    )
