"""Which keys each block of queries meets, and the other way about, as tables that kernels read."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from memtx.ops.attention.mask import KeyRange, Visibility

INT32_MAX = 2**31 - 1


@lru_cache(maxsize=64)
def build_key_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return (query blocks, sections, 2) int32: the keys [low, high) that each block of queries may see."""
    table = []
    for start in range(0, num_queries, block_size):
        offset = 0
        for section in key_ranges:
            low, high = section.find_visible_keys(start, min(start + block_size, num_queries))
            table.append((offset + low, offset + high))
            offset += section.num_keys
    return torch.tensor(table, dtype=torch.int32).view(-1, len(key_ranges), 2).to(device)


@lru_cache(maxsize=64)
def build_query_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return (key blocks, 4) int32: keys [low, high) within one section, and the queries [start, stop) they meet."""
    table, offset = [], 0
    for section in key_ranges:
        for low in range(0, section.num_keys, block_size):
            high = min(low + block_size, section.num_keys)
            table.append((offset + low, offset + high, *section.find_attending_queries(low, high, num_queries)))
        offset += section.num_keys
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device)


def get_int32_bounds(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Return births and ends, (rows, keys) int32 each, made once: ticks of a call are far fewer than 2^31."""

    def make() -> tuple[Tensor, Tensor]:
        born, expires = (
            x.clamp(-INT32_MAX, INT32_MAX).to(torch.int32).contiguous()
            for x in (visibility.visible_from, visibility.visible_until)
        )
        return born, expires

    return visibility.memo("int32_bounds", make)
