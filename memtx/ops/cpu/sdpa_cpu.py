"""Bands and gathered blocks through the CPU's fused kernel: ``scaled_dot_product_attention``'s, by its own name.

Only by that name it gives its log-sum-exp, by which the ranges of a block are joined. The backward pass hands
the joined output and log-sum-exp to the fused backward of every range, which is what makes each range's gradient
the exact one (the trick of ring attention, Liu et al. 2023, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.block_plan import Band
from memtx.ops.attention.combine import merge_attention
from memtx.ops.attention.key_bias import PAD_COLUMNS
from memtx.ops.cpu import bf16_backward
from memtx.ops.cpu.gathered_blocks import GatheredBlocks


class _BandedSDPA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bands: list[Band], gathered: GatheredBlocks | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, heads, queries, _ = q.shape
        # Laid out as (rows, queries, heads, head_dim), which the projection after it reads without a copy.
        out = q.new_zeros(rows, queries, heads, v.shape[-1]).transpose(1, 2)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full((rows, queries, heads), float("-inf"), dtype=kind, device=q.device)
        at = 0
        while at < len(bands):
            start, stop = bands[at].query_start, bands[at].query_stop
            parts = []
            while at < len(bands) and bands[at].query_start == start:
                band = bands[at]
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[:, :, start:stop], k[:, :, band.key_start : band.key_stop],
                    v[:, :, band.key_start : band.key_stop], 0.0, False, attn_mask=band.mask, scale=scale,
                )  # fmt: skip
                # The kernel gives 0 for a query that sees nothing; the truth is minus infinity.
                part_lse = part_lse.transpose(1, 2).masked_fill(band.fully_masked, float("-inf"))
                parts.append((part.transpose(1, 2), part_lse))
                at += 1
            joined, joined_lse = merge_attention(parts)
            out[:, :, start:stop] = joined.transpose(1, 2)
            lse[:, start:stop] = joined_lse
        if gathered is not None:
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                gathered.split_queries(q),
                gathered.gather_keys(k),
                gathered.gather_keys(v),
                0.0,
                False,
                attn_mask=gathered.mask,
                scale=scale,
            )
            part_lse = part_lse.transpose(1, 2).masked_fill(gathered.fully_masked, float("-inf"))
            others = gathered.join_queries(part.transpose(1, 2), queries), gathered.join_queries(part_lse, queries)
            joined, lse = merge_attention([(out.transpose(1, 2), lse), others])
            out = joined.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bands, ctx.gathered, ctx.scale = bands, gathered, scale
        ctx.set_materialize_grads(False)
        return out, lse.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return None, None, None, None, None, None
            grad_out = torch.zeros_like(out)
        # A query that saw nothing anywhere has weights exp(-inf - 0) = 0.
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        plain = ctx.gathered is None and not any(band.has_bias for band in ctx.bands)
        if q.dtype == torch.bfloat16 and plain and bf16_backward.is_faster():
            balance = (grad_out.float() * out.float()).sum(-1)
            balance = balance if grad_lse is None else balance - grad_lse
            grads = bf16_backward.backward(q, k, v, finite.transpose(1, 2), balance, grad_out, ctx.bands, ctx.scale)
            return *grads, None, None, None
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # The gradient of a score is weight * (grad_out v' - grad_out out' + grad_lse), and the kernel makes
            # all but the last term. A column that is 0 in v, 1 in grad_out and -grad_lse in out adds just that.
            q, k, v, out, grad_out = (F.pad(x, (0, PAD_COLUMNS)) for x in (q, k, v, out, grad_out))
            grad_out[..., head_dim] = 1.0
            out[..., head_dim] = -grad_lse
        grad_q, grad_k, grad_v = (
            torch.zeros_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (q, k, v)
        )
        for band in ctx.bands:
            rows, keys = slice(band.query_start, band.query_stop), slice(band.key_start, band.key_stop)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
                finite[:, rows].transpose(1, 2), 0.0, False, attn_mask=band.mask, scale=ctx.scale,
            )  # fmt: skip
            grad_q[:, :, rows] += gq
            grad_k[:, :, keys] += gk
            grad_v[:, :, keys] += gv
        if ctx.gathered is not None:
            _add_gathered_grads(ctx.gathered, (grad_out, q, k, v, out, finite), (grad_q, grad_k, grad_v), ctx.scale)
        if grad_lse is not None:
            grad_q, grad_k, grad_v = (x[..., :head_dim] for x in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None, None


def _add_gathered_grads(
    gathered: GatheredBlocks, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], scale: float
) -> None:
    """Add the gathered blocks' gradients to those of the bands."""
    grad_out, q, k, v, out, lse = saved
    queries = q.shape[2]
    gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gathered.split_queries(grad_out), gathered.split_queries(q), gathered.gather_keys(k), gathered.gather_keys(v),
        gathered.split_queries(out), gathered.split_queries(lse.transpose(1, 2)[..., None])[..., 0], 0.0, False,
        attn_mask=gathered.mask, scale=scale,
    )  # fmt: skip
    grads[0].transpose(1, 2).add_(gathered.join_queries(gq.transpose(1, 2), queries))
    gathered.scatter_add_keys(grads[1], gk)
    gathered.scatter_add_keys(grads[2], gv)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bands: list[Band], scale: float, gathered: GatheredBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, both with gradient; shapes as in the reference, on the CPU only.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        bands: the bands.
        scale: factor of the scores.
        gathered: blocks of keys that are seen besides.
    """
    out, lse = _BandedSDPA.apply(q, k, v, bands, gathered, scale)  # type: ignore[no-untyped-call]
    return out, lse
