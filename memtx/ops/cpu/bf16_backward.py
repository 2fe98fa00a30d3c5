"""The bands' backward pass in bfloat16 by plain matrix products, which CPUs with bfloat16 units run at full speed.

The weights are made again from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1.2). A product in bfloat16 is
summed in float32 but rounded to 8 bits on leaving, which for a large score would spoil its weight. So a level is taken
off within the product, by two more columns, such that what is left is near 0, and its rounding with it, where a
query's weight lies: the log-sum-exp less about the entropy of the weights. The same columns take the
balance ``grad_out . out`` off the weights' gradients.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from memtx.ops.attention.block_plan import Band
from memtx.ops.cpu import bf16


@cache
def is_faster() -> bool:
    """Return whether the CPU multiplies bfloat16 natively; else the fused kernel is the better way."""
    return bf16.is_cpu_bf16_fast() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _append_split_column(x: Tensor, column: Tensor) -> Tensor:
    """Return x (..., n, head_dim) with two columns that add up to ``column`` (..., n) float32."""
    high = column.to(x.dtype)
    low = (column - high.float()).to(x.dtype)
    return torch.cat([x, high[..., None], low[..., None]], dim=-1)


def _estimate_entropy_bits(q: Tensor, k: Tensor, lse: Tensor, bands: list[Band], scale: float) -> Tensor:
    """Return whole n such that a query's weights are about 2^-n each: a guess of their entropy in bits.

    Were scores normal, of n keys seen with mean m, the entropy would be 2 log n - (lse - m). Whatever it is, only
    rounding depends on it.
    """
    count = torch.zeros(q.shape[0], 1, q.shape[2], device=q.device)
    for band in bands:
        count[:, :, band.query_start : band.query_stop] += (band.mask == 0).sum(-1)
    most = count.clamp(min=1).log()
    middle = k.float().mean(2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)[..., None]
    mean = (q.float() @ middle)[..., 0] * scale
    guess = (2 * most - lse + mean).clamp(min=0)
    return (torch.minimum(guess, most) / math.log(2)).round()


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    bands: list[Band],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, added up over the bands in float32.

    Args:
        q: (rows, heads, queries, head_dim) bfloat16.
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        lse: (rows, heads, queries) float32, finite.
        delta: (rows, heads, queries) float32, what is taken off each gradient of a weight.
        grad_out: (rows, heads, queries, head_dim).
        bands: the bands, their masks nothing but 0 and minus infinity.
        scale: factor of the scores.
    """
    rows, heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    batch = rows * kv_heads

    def of_queries(x: Tensor) -> Tensor:
        return x.reshape(batch, group, *x.shape[2:])

    one = k.new_full((*k.shape[:3], 2), -1.0)
    level = _estimate_entropy_bits(q, k, lse, bands, scale)
    asks = of_queries(_append_split_column(q, (lse - level * math.log(2)) / scale))
    # By a power of two, so nothing is rounded: the weights below are 2^level times too large.
    less = torch.exp2(-level)
    told = of_queries(_append_split_column(grad_out * less.to(q.dtype)[..., None], delta * less))
    keys, values = (torch.cat([x, one], dim=-1).flatten(0, 1) for x in (k, v))
    grads = [torch.zeros(*x.shape[:-1], head_dim, dtype=torch.float32, device=x.device) for x in (asks, keys, values)]
    for band in bands:
        size = (band.query_stop - band.query_start, band.key_stop - band.key_start)
        at, met = slice(band.query_start, band.query_stop), slice(band.key_start, band.key_stop)
        ask, tell = (x[:, :, at].reshape(batch, group * size[0], -1) for x in (asks, told))
        key, value = keys[:, met], values[:, met]
        weights = q.new_empty(rows, heads, *size).copy_(band.mask).view(batch, group * size[0], size[1])
        weights.baddbmm_(ask, key.transpose(1, 2), alpha=scale).exp_()
        grads[2][:, met] += torch.bmm(weights.transpose(1, 2), tell[..., :head_dim])
        weights.mul_(torch.bmm(tell, value.transpose(1, 2)))
        grads[0][:, :, at] += torch.bmm(weights, key[..., :head_dim]).view(batch, group, size[0], head_dim)
        grads[1][:, met] += torch.bmm(weights.transpose(1, 2), ask[..., :head_dim])
    return (
        grads[0].mul_(scale).to(q.dtype).view(q.shape),
        grads[1].mul_(scale).to(k.dtype).view(k.shape),
        grads[2].to(v.dtype).view(v.shape),
    )
