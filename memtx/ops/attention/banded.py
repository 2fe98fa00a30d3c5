"""Banded attention: each block of queries meets only the keys that any of them may see, through views.

A block's keys come in one or two ranges (compressed prefix, exact window). On the CPU each range is one fused
call on slices of q, k and v, nothing is copied, and the ranges are joined by their log-sum-exp. Cost and memory
are linear in the number of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.ops.attention import blocks, sparse
from memtx.ops.attention.bias import ScoreBias, bias_requires_grad
from memtx.ops.attention.block_plan import BLOCK_SIZE, build_bands
from memtx.ops.attention.combine import merge_attention
from memtx.ops.attention.mask import Visibility
from memtx.ops.cpu import sdpa_cpu
from memtx.ops.cpu.gathered_blocks import GatheredBlocks, gather_random_blocks


def _attend_key_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    block_size: int,
    need_lse: bool,
    dropout: float,
    include_random_blocks: bool,
) -> tuple[Tensor, Tensor | None]:
    if bias_requires_grad(bias) or dropout > 0.0:
        return blocks.attend_unfused(q, k, v, visibility, bias, scale, block_size, dropout)
    if q.device.type != "cpu":
        if need_lse:
            return blocks.attend_unfused(q, k, v, visibility, bias, scale, block_size)
        return blocks.attend_sdpa(q, k, v, visibility, bias, scale, block_size), None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    key = ("bands", block_size, dtype, bias)
    plan = visibility.memo(key, lambda: build_bands(visibility, bias, block_size, dtype))
    return sdpa_cpu.attend(
        q, k, v, plan, scale, _get_gathered_blocks(q, k, visibility, dtype) if include_random_blocks else None
    )


def _get_gathered_blocks(q: Tensor, k: Tensor, visibility: Visibility, dtype: torch.dtype) -> GatheredBlocks:
    """Return the layout of random blocks, made once for all calls of these shapes."""
    shapes = (q.shape[0], q.shape[1], k.shape[1])
    return visibility.memo(("gathered", *shapes, dtype), lambda: gather_random_blocks(visibility, *shapes, dtype))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float,
    block_size: int = BLOCK_SIZE,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output and its log-sum-exp, both with gradient; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores; one that learns takes the way of :func:`blocks.attend_unfused`.
        dropout: probability with which an attention weight is dropped; takes the same way.
        scale: factor of the scores.
        block_size: queries a block.
        need_lse: whether the log-sum-exp is needed; else it may be None.
    """
    beside = visibility.pattern
    random = beside is not None and beside.random_blocks is not None
    overlaid = beside is not None and beside.global_queries is not None
    # The CPU's kernel takes random blocks with the bands; elsewhere they are joined by log-sum-exp.
    joined = random and bias is None and dropout == 0.0 and q.device.type == "cpu"
    out, lse = _attend_key_ranges(
        q, k, v, visibility, bias, scale, block_size, need_lse or random or overlaid, dropout, joined
    )
    if random and not joined:
        assert lse is not None
        out, lse = merge_attention([(out, lse), sparse.attend_random_blocks(q, k, v, visibility, bias, scale, dropout)])
    if overlaid:
        assert lse is not None
        out, lse = sparse.attend_global_queries(q, k, v, visibility, bias, scale, dropout, (out, lse))
    return out, lse
