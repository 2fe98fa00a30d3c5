"""Banded attention: each block of queries meets only the keys that any of them may see, through views.

A block's keys come in one or two ranges (compressed prefix, exact window). Each range is one fused call on
slices of q, k and v, nothing is copied, and the ranges are joined by their log-sum-exp. The backward pass
hands the joined output and log-sum-exp to the fused backward of every range, which is what makes each
range's gradient the exact one (the trick of ring attention, Liu et al. 2023, section 3). Cost and memory are
linear in the number of queries.

On the CPU the fused call is the one behind ``scaled_dot_product_attention``, which gives its log-sum-exp
only by that name; elsewhere the public call is used, over the ranges joined first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import Bias, bias_of
from memtx.ops.attention.merge import merge
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
    """

    start: int
    stop: int
    low: int
    high: int
    mask: Tensor
    blind: Tensor


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


def _mask(
    visibility: Visibility, bias: Bias | None, queries: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    seen = visible(visibility, queries, keys)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + bias_of(bias, visibility, queries, keys).to(dtype)
    return mask, ~seen.any(-1)[:, :, None]


def bands(visibility: Visibility, bias: Bias | None, block: int, dtype: torch.dtype) -> list[Band]:
    """Return the fused calls of a whole segment; made once for all layers that share ``visibility``."""
    made = []
    for start, stop, parts in cut(visibility, block):
        for low, high in parts:
            mask, blind = _mask(visibility, bias, (start, stop), (low, high), dtype)
            made.append(Band(start, stop, low, high, mask, blind))
    return made


class _FusedBands(torch.autograd.Function):
    """Every band through the CPU's fused kernel, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: list[Band], scale: float) -> tuple[Tensor, Tensor]:
        rows, heads, queries, _ = q.shape
        # Laid out as (rows, queries, heads, head_dim), which the projection after it reads without a copy.
        out = q.new_zeros(rows, queries, heads, v.shape[-1]).transpose(1, 2)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full((rows, queries, heads), float("-inf"), dtype=kind, device=q.device)
        at = 0
        while at < len(plan):
            start, stop = plan[at].start, plan[at].stop
            parts = []
            while at < len(plan) and plan[at].start == start:
                band = plan[at]
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[:, :, start:stop], k[:, :, band.low : band.high], v[:, :, band.low : band.high],
                    0.0, False, attn_mask=band.mask, scale=scale,
                )  # fmt: skip
                # The kernel gives 0 for a query that sees nothing; the truth is minus infinity.
                part_lse = part_lse.transpose(1, 2).masked_fill(band.blind, float("-inf"))
                parts.append((part.transpose(1, 2), part_lse))
                at += 1
            joined, joined_lse = merge(parts)
            out[:, :, start:stop] = joined.transpose(1, 2)
            lse[:, start:stop] = joined_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = (
            torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (q, k, v)
        )
        # A query that saw nothing anywhere has weights exp(-inf - 0) = 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        for band in ctx.plan:
            rows, keys = slice(band.start, band.stop), slice(band.low, band.high)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                lse[:, rows].transpose(1, 2), 0.0, False, attn_mask=band.mask, scale=ctx.scale,
            )  # fmt: skip
            grad_q[:, :, rows] += gq
            grad_k[:, :, keys] += gk
            grad_v[:, :, keys] += gv
        return grad_q, grad_k, grad_v, None, None


def _portable(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Bias | None, scale: float, block: int
) -> Tensor:
    """One public fused call a block, over its ranges joined."""
    out = []
    group = q.shape[1] // k.shape[1]
    for start, stop, parts in cut(visibility, block):
        if not parts:
            out.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        masks = [_mask(visibility, bias, (start, stop), part, q.dtype) for part in parts]
        mask = torch.cat([one for one, _ in masks], dim=-1)
        blind = torch.stack([one for _, one in masks]).all(0).transpose(1, 2)[..., None]
        keys, values = (torch.cat([x[:, :, low:high] for low, high in parts], dim=2) for x in (k, v))
        one = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            keys,
            values,
            # Backends differ on a query that sees nothing: let it see all, then erase it.
            attn_mask=mask.masked_fill(blind[..., 0][..., None], 0.0),
            scale=scale,
            enable_gqa=group > 1,
        )
        out.append(one.masked_fill(blind, 0.0))
    return torch.cat(out, dim=2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Bias | None = None,
    dropout: float = 0.0,
    scale: float,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output, and its log-sum-exp on the CPU; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores.
        dropout: must be 0 here.
        scale: factor of the scores.
        block: queries a block.
    """
    assert dropout == 0.0, "the dispatcher sends dropout to the reference"
    if q.device.type != "cpu":
        return _portable(q, k, v, visibility, bias, scale, block), None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    key = ("bands", block, dtype, bias)
    plan = visibility.once(key, lambda: bands(visibility, bias, block, dtype))
    out, lse = _FusedBands.apply(q, k, v, plan, scale)  # type: ignore[no-untyped-call]
    return out, lse.transpose(1, 2)
