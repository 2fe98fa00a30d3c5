"""Backward pass of the bands by plain matrix products in bfloat16, which CPUs with bfloat16 units run at full speed.

The weights are recomputed from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1.2). A bfloat16 product is
accumulated in float32 but rounded to 8 bits, which would spoil the weight of a large score. Two additional columns
therefore subtract a level inside the product, so that the result, and its rounding error, is near 0 where most of a
query's weight lies: the log-sum-exp minus about the entropy of the weights. The same columns subtract the delta
``grad_out . out`` from the gradients of the weights.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from memtx.ops.attention.block_plan import Band
from memtx.ops.cpu import cpu_info


@cache
def is_faster() -> bool:
    """Return True if the CPU multiplies bfloat16 natively; otherwise the fused kernel is faster."""
    return cpu_info.is_cpu_bf16_fast() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _append_split_column(x: Tensor, column: Tensor) -> Tensor:
    """Append two columns to x (..., n, head_dim) that add up to ``column`` (..., n) float32."""
    high = column.to(x.dtype)
    low = (column - high.float()).to(x.dtype)
    return torch.cat([x, high[..., None], low[..., None]], dim=-1)


def _estimate_entropy_bits(q: Tensor, k: Tensor, lse: Tensor, bands: list[Band], scale: float) -> Tensor:
    """Return integers n such that a query's weights are about 2^-n each: an estimate of their entropy in bits.

    For normally distributed scores of n keys with mean m the entropy is 2 log n - (lse - m). A wrong estimate affects
    rounding only.
    """
    count = torch.zeros(q.shape[0], 1, q.shape[2], device=q.device)
    for band in bands:
        count[:, :, band.query_start : band.query_stop] += (band.mask == 0).sum(-1)
    max_entropy = count.clamp(min=1).log()
    mean_key = k.float().mean(2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)[..., None]
    mean_score = (q.float() @ mean_key)[..., 0] * scale
    entropy = (2 * max_entropy - lse + mean_score).clamp(min=0)
    return (torch.minimum(entropy, max_entropy) / math.log(2)).round()


def backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad_out: Tensor, bands: list[Band], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v (bfloat16), accumulated over bands without bias in float32.

    Shapes are those of :func:`memtx.ops.attention.reference.attend`. ``lse`` (finite) and ``delta``, which is
    subtracted from the gradients of the weights, are ``(batch, heads, queries)`` float32.
    """
    batch_size, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    num_sequences = batch_size * kv_heads

    def group_heads(x: Tensor) -> Tensor:
        return x.reshape(num_sequences, group, *x.shape[2:])

    minus_one = k.new_full((*k.shape[:3], 2), -1.0)
    level = _estimate_entropy_bits(q, k, lse, bands, scale)
    all_q = group_heads(_append_split_column(q, (lse - level * math.log(2)) / scale))
    # A power of two rounds nothing: the weights below are 2^level times too large.
    factor = torch.exp2(-level)
    all_grad_out = group_heads(_append_split_column(grad_out * factor.to(q.dtype)[..., None], delta * factor))
    all_k, all_v = (torch.cat([x, minus_one], dim=-1).flatten(0, 1) for x in (k, v))
    grad_q, grad_k, grad_v = (
        torch.zeros(*x.shape[:-1], head_dim, dtype=torch.float32, device=x.device) for x in (all_q, all_k, all_v)
    )
    for band in bands:
        num_queries, num_keys = band.query_stop - band.query_start, band.key_stop - band.key_start
        queries, keys = slice(band.query_start, band.query_stop), slice(band.key_start, band.key_stop)
        band_q, band_grad_out = (
            x[:, :, queries].reshape(num_sequences, group * num_queries, -1) for x in (all_q, all_grad_out)
        )
        band_k, band_v = all_k[:, keys], all_v[:, keys]
        weights = q.new_empty(batch_size, heads, num_queries, num_keys).copy_(band.mask)
        weights = weights.view(num_sequences, group * num_queries, num_keys)
        weights.baddbmm_(band_q, band_k.transpose(1, 2), alpha=scale).exp_()
        grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), band_grad_out[..., :head_dim])
        grad_scores = weights.mul_(torch.bmm(band_grad_out, band_v.transpose(1, 2)))
        band_grad_q = torch.bmm(grad_scores, band_k[..., :head_dim])
        grad_q[:, :, queries] += band_grad_q.view(num_sequences, group, num_queries, head_dim)
        grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), band_q[..., :head_dim])
    return (
        grad_q.mul_(scale).to(q.dtype).view(q.shape),
        grad_k.mul_(scale).to(k.dtype).view(k.shape),
        grad_v.to(v.dtype).view(v.shape),
    )
