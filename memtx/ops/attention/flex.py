"""Attention through torch's flex_attention: the lifetimes as a mask function, whole blocks left out.

Meant for CUDA, where it is compiled into one kernel; on the CPU it runs uncompiled, for comparison only. The table
of blocks comes from the static sections alone and is kept by shape; lifetimes are tensors that the mask
function reads, so nothing is made or compiled anew as the memory fills.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from memtx.ops.attention.bias import AlibiBias
from memtx.ops.attention.mask import KeyRange, Visibility

BLOCK_SIZE = 128
"""Queries, and keys, a block: flex_attention's own default."""


@cache
def _load_flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=False) if compiled else function


@lru_cache(maxsize=64)
def create_static_block_mask(key_ranges: tuple[KeyRange, ...], num_queries: int, device: torch.device) -> Any:
    """Return the BlockMask of what the sections cannot rule out, its mask function still to be set."""
    from torch.nn.attention.flex_attention import BlockMask

    keys = sum(section.num_keys for section in key_ranges)
    size = (-(-num_queries // BLOCK_SIZE), -(-keys // BLOCK_SIZE))
    may = torch.zeros(size, dtype=torch.bool)
    for block in range(size[0]):
        offset = 0
        for section in key_ranges:
            low, high = section.find_visible_keys(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, num_queries))
            if high > low:
                may[block, (offset + low) // BLOCK_SIZE : (offset + high - 1) // BLOCK_SIZE + 1] = True
            offset += section.num_keys
    # Blocks to visit first, in order.
    index = torch.argsort(~may, dim=1, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        may.sum(1, dtype=torch.int32)[None, None].to(device),
        index[None, None].to(device),
        BLOCK_SIZE=BLOCK_SIZE,
        seq_lengths=(num_queries, keys),
    )


def _create_block_mask(visibility: Visibility, batch_size: int) -> Any:
    born, expires = visibility.visible_from.expand(batch_size, -1), visibility.visible_until.expand(batch_size, -1)

    def sees(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (born[row, key] <= query) & (query < expires[row, key])

    mask = copy.copy(create_static_block_mask(visibility.key_ranges, visibility.num_queries, born.device))
    mask.mask_mod = sees
    return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: AlibiBias | None = None,
    dropout: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention output and its log-sum-exp, on CUDA with gradient; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom, by lifetimes alone; its mask is made once for all layers that share it.
        bias: added to the scaled scores.
        dropout: must be 0 here.
        scale: factor of the scores.
    """
    assert dropout == 0.0, "the dispatcher sends dropout elsewhere"
    assert visibility.pattern is None, "the dispatcher sends patterns elsewhere"
    mask = visibility.memo(("flex", q.shape[0]), lambda: _create_block_mask(visibility, q.shape[0]))
    score = None
    if bias is not None:
        slopes, tick = bias.slopes.to(q.dtype), bias.key_offset.expand(q.shape[0], -1).to(torch.float32)

        def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return value - slopes[head] * (query - tick[row, key])

    from torch.nn.attention.flex_attention import AuxRequest

    grouped = q.shape[1] != k.shape[1]
    aux = AuxRequest(lse=True)
    out, made = _load_flex_attention(q.is_cuda)(
        q, k, v, score_mod=score, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=aux
    )
    return out, made.lse
