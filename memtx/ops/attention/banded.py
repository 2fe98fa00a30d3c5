"""Banded attention: each block of queries meets only the keys that any of them may see, through views.

A block's keys come in one or two ranges (compressed prefix, exact window). On the CPU each range is one fused
call on slices of q, k and v, nothing is copied, and the ranges are joined by their log-sum-exp. Cost and memory
are linear in the number of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.ops.attention import blocks, fused, pattern
from memtx.ops.attention.bias import ScoreBias, learns
from memtx.ops.attention.fused_blocks import Gathered, gather
from memtx.ops.attention.merge import merge
from memtx.ops.attention.plan import BLOCK, bands
from memtx.ops.visibility import Visibility


def _by_lifetimes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    block: int,
    need_lse: bool,
    dropout: float,
    with_blocks: bool,
) -> tuple[Tensor, Tensor | None]:
    if learns(bias) or dropout > 0.0:
        return blocks.plain(q, k, v, visibility, bias, scale, block, dropout)
    if q.device.type != "cpu":
        if need_lse:
            return blocks.plain(q, k, v, visibility, bias, scale, block)
        return blocks.fused(q, k, v, visibility, bias, scale, block), None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    key = ("bands", block, dtype, bias)
    plan = visibility.once(key, lambda: bands(visibility, bias, block, dtype))
    return fused.attend(q, k, v, plan, scale, _gathered(q, k, visibility, dtype) if with_blocks else None)


def _gathered(q: Tensor, k: Tensor, visibility: Visibility, dtype: torch.dtype) -> Gathered:
    """Return the layout of random blocks, made once for all calls of these shapes."""
    shapes = (q.shape[0], q.shape[1], k.shape[1])
    return visibility.once(("gathered", *shapes, dtype), lambda: gather(visibility, *shapes, dtype))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float,
    block: int = BLOCK,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output and its log-sum-exp, both with gradient; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores; one that learns takes the way of :func:`blocks.plain`.
        dropout: probability with which an attention weight is dropped; takes the same way.
        scale: factor of the scores.
        block: queries a block.
        need_lse: whether the log-sum-exp is needed; else it may be None.
    """
    beside = visibility.pattern
    random = beside is not None and beside.blocks is not None
    overlaid = beside is not None and beside.queries is not None
    # The CPU's kernel takes random blocks with the bands; elsewhere they are joined by log-sum-exp.
    joined = random and bias is None and dropout == 0.0 and q.device.type == "cpu"
    out, lse = _by_lifetimes(q, k, v, visibility, bias, scale, block, need_lse or random or overlaid, dropout, joined)
    if random and not joined:
        assert lse is not None
        out, lse = merge([(out, lse), pattern.random_blocks(q, k, v, visibility, bias, scale, dropout)])
    if overlaid:
        assert lse is not None
        out, lse = pattern.global_queries(q, k, v, visibility, bias, scale, dropout, (out, lse))
    return out, lse
