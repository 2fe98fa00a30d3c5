"""The bands through the CPU's fused kernel, the one behind ``scaled_dot_product_attention``, by its own name.

Only by that name it gives its log-sum-exp, by which the ranges of a block are joined. The backward pass hands
the joined output and log-sum-exp to the fused backward of every range, which is what makes each range's gradient
the exact one (the trick of ring attention, Liu et al. 2023, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention import by_products
from memtx.ops.attention.merge import merge
from memtx.ops.attention.plan import Band

PAD = 8
"""Columns added to a head to carry the log-sum-exp's gradient; only the first is used, eight keep rows aligned."""


class _FusedBands(torch.autograd.Function):
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
        ctx.set_materialize_grads(False)
        return out, lse.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, None
            grad_out = torch.zeros_like(out)
        # A query that saw nothing anywhere has weights exp(-inf - 0) = 0.
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        if q.dtype == torch.bfloat16 and by_products.are_faster() and not any(band.biased for band in ctx.plan):
            balance = (grad_out.float() * out.float()).sum(-1)
            balance = balance if grad_lse is None else balance - grad_lse
            grads = by_products.backward(q, k, v, finite.transpose(1, 2), balance, grad_out, ctx.plan, ctx.scale)
            return *grads, None, None
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # The gradient of a score is weight * (grad_out v' - grad_out out' + grad_lse), and the kernel makes
            # all but the last term. A column that is 0 in v, 1 in grad_out and -grad_lse in out adds just that.
            q, k, v, out, grad_out = (F.pad(x, (0, PAD)) for x in (q, k, v, out, grad_out))
            grad_out[..., head_dim] = 1.0
            out[..., head_dim] = -grad_lse
        grad_q, grad_k, grad_v = (
            torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (q, k, v)
        )
        for band in ctx.plan:
            rows, keys = slice(band.start, band.stop), slice(band.low, band.high)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                finite[:, rows].transpose(1, 2), 0.0, False, attn_mask=band.mask, scale=ctx.scale,
            )  # fmt: skip
            grad_q[:, :, rows] += gq
            grad_k[:, :, keys] += gk
            grad_v[:, :, keys] += gv
        if grad_lse is not None:
            grad_q, grad_k, grad_v = (x[..., :head_dim] for x in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: list[Band], scale: float) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, both with gradient; shapes as in the reference, on the CPU only."""
    out, lse = _FusedBands.apply(q, k, v, plan, scale)  # type: ignore[no-untyped-call]
    return out, lse
