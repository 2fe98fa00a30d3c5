"""Which keys each block of queries meets, and the other way about, as tables that kernels read."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from memtx.ops.visibility import Section, Visibility

NEVER = 2**31 - 1


@lru_cache(maxsize=64)
def key_ranges(sections: tuple[Section, ...], queries: int, block: int, device: torch.device) -> Tensor:
    """Return (query blocks, sections, 2) int32: the keys [low, high) that each block of queries may see."""
    table = []
    for start in range(0, queries, block):
        offset = 0
        for section in sections:
            low, high = section.seen(start, min(start + block, queries))
            table.append((offset + low, offset + high))
            offset += section.keys
    return torch.tensor(table, dtype=torch.int32).view(-1, len(sections), 2).to(device)


@lru_cache(maxsize=64)
def query_ranges(sections: tuple[Section, ...], queries: int, block: int, device: torch.device) -> Tensor:
    """Return (key blocks, 4) int32: keys [low, high) within one section, and the queries [start, stop) they meet."""
    table, offset = [], 0
    for section in sections:
        for low in range(0, section.keys, block):
            high = min(low + block, section.keys)
            table.append((offset + low, offset + high, *section.seeing(low, high, queries)))
        offset += section.keys
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device)


def lifetimes(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Return births and ends, (rows, keys) int32 each, made once: ticks of a call are far fewer than 2^31."""

    def make() -> tuple[Tensor, Tensor]:
        born, expires = (
            x.clamp(-NEVER, NEVER).to(torch.int32).contiguous() for x in (visibility.born, visibility.expires)
        )
        return born, expires

    return visibility.once("lifetimes", make)
