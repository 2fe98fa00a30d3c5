"""Attention over bands and random blocks by the CPU's fused kernel behind ``scaled_dot_product_attention``.

Called directly, the kernel returns the log-sum-exp, by which the key ranges of a block are merged. The backward pass
gives the merged output and log-sum-exp to the fused backward of every range, which makes each range's gradient exact
(as in ring attention, Liu et al. 2023, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import PAD_COLUMNS
from memtx.ops.attention.mask import Visibility
from memtx.ops.attention.reference import merge_attention
from memtx.ops.attention.sparse import find_key_blocks
from memtx.ops.cpu import cpu_info


@dataclass(frozen=True)
class Band:
    """One fused call: a block of queries and a range of keys.

    Attributes:
        mask: ``(batch or 1, heads or 1, queries, keys)``, the additive mask in the dtype of the scores.
        fully_masked: ``(batch or 1, queries, heads or 1)`` bool, True for queries that see none of the keys.
        has_bias: If True, the mask holds values other than 0 and minus infinity.
    """

    queries: slice
    keys: slice
    mask: Tensor
    fully_masked: Tensor
    has_bias: bool


@dataclass(frozen=True)
class GatheredBlocks:
    """Random blocks laid out for the fused kernel: every query block is a batch entry.

    Keys are gathered before the kernel and freed after it, forward and backward, and all queries of a block share a row
    of the mask unless a document starts or ends in it, so nothing as large as the scores is stored.

    Attributes:
        block_size: Number of queries, and of keys, per block.
        first_key: Index of the first key of key block 0.
        num_query_blocks: Number of query blocks per sequence.
        num_key_blocks: Number of key blocks per sequence.
        indices: ``(batch * num_query_blocks * heads * r,)`` int64, key blocks among those of all sequences and heads.
        mask: ``(batch * num_query_blocks, heads, block_size, r * block_size)``, additive mask, possibly expanded.
        fully_masked: ``(batch * num_query_blocks, block_size, heads)`` bool, True for queries that see no key.
    """

    block_size: int
    first_key: int
    num_query_blocks: int
    num_key_blocks: int
    indices: Tensor
    mask: Tensor
    fully_masked: Tensor

    def split_queries(self, x: Tensor) -> Tensor:
        """Reshape (batch, heads, queries, width) to (batch * num_query_blocks, heads, block_size, width)."""
        batch_size, heads, queries, width = x.shape
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, self.num_query_blocks * self.block_size - queries))
        return x.reshape(batch_size * self.num_query_blocks, self.block_size, heads, width).transpose(1, 2)

    def join_queries(self, x: Tensor, num_queries: int) -> Tensor:
        """Reshape (batch * num_query_blocks, block_size, heads, ...) to (batch, queries, heads, ...)."""
        return x.reshape(-1, self.num_query_blocks * self.block_size, *x.shape[2:])[:, :num_queries]

    def gather_keys(self, x: Tensor) -> Tensor:
        """Gather (batch, kv_heads, keys, width) to (batch * num_query_blocks, heads, r * block_size, width)."""
        batch_size, kv_heads, keys, width = x.shape
        x = F.pad(x[:, :, self.first_key :], (0, 0, 0, self.num_key_blocks * self.block_size - keys + self.first_key))
        x = x.view(batch_size, kv_heads, self.num_key_blocks, self.block_size, width).transpose(1, 2)
        x = x.reshape(-1, self.block_size * width).index_select(0, self.indices)
        return x.view(*self.mask.shape[:2], -1, width)

    def scatter_add_keys(self, grad_keys: Tensor, x: Tensor) -> None:
        """Add x, in the shape of :meth:`gather_keys`, in place to the keys it was gathered from."""
        batch_size, kv_heads, keys, width = grad_keys.shape
        total = x.new_zeros(batch_size * self.num_key_blocks * kv_heads, self.block_size * width)
        total.index_add_(0, self.indices, x.reshape(-1, self.block_size * width))
        total = total.view(batch_size, self.num_key_blocks, kv_heads, self.block_size, width).transpose(1, 2)
        grad_keys[:, :, self.first_key :] += total.flatten(2, 3)[:, :, : keys - self.first_key]


def get_gathered_blocks(q: Tensor, k: Tensor, visibility: Visibility, dtype: torch.dtype) -> GatheredBlocks:
    """Return a visibility's random blocks, laid out for q and k with a mask in ``dtype``; cached."""
    batch_size, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]

    def build() -> GatheredBlocks:
        pattern, blocks = visibility.pattern, find_key_blocks(visibility)
        assert pattern is not None
        size, num_key_blocks = pattern.block_size, blocks.num_key_blocks
        table = blocks.table.expand(heads, -1, -1).transpose(0, 1)  # (num_query_blocks, heads, r)
        head = torch.arange(heads, device=table.device)[:, None] * kv_heads // heads
        sequence = torch.arange(batch_size, device=table.device)[:, None, None, None]
        indices = (sequence * num_key_blocks * kv_heads + table * kv_heads + head).flatten()
        visible = blocks.mask.transpose(1, 2).expand(batch_size, -1, heads, -1, -1).flatten(0, 1)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
        fully_masked = (~visible.any(-1)).expand(-1, -1, size).transpose(1, 2)
        mask = mask.expand(-1, -1, size, -1)
        return GatheredBlocks(size, pattern.first_key, table.shape[0], num_key_blocks, indices, mask, fully_masked)

    return visibility.memo(("gathered", batch_size, heads, kv_heads, dtype), build)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fully_masked: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output (batch, queries, heads, head_dim) and log-sum-exp (batch, queries, heads) of one fused call."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    # The kernel returns 0 for fully masked queries; the correct value is minus infinity.
    return out.transpose(1, 2), lse.transpose(1, 2).masked_fill(fully_masked, float("-inf"))


@cache
def is_bf16_backward_faster() -> bool:
    """Return True if the CPU multiplies bfloat16 natively: :func:`compute_bf16_grads` beats the fused kernel."""
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
        count[:, :, band.queries] += (band.mask == 0).sum(-1)
    max_entropy = count.clamp(min=1).log()
    mean_key = k.float().mean(2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)[..., None]
    mean_score = (q.float() @ mean_key)[..., 0] * scale
    entropy = (2 * max_entropy - lse + mean_score).clamp(min=0)
    return (torch.minimum(entropy, max_entropy) / math.log(2)).round()


def compute_bf16_grads(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad_out: Tensor, bands: list[Band], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v (bfloat16) by matrix products, for bands without bias.

    The weights are recomputed from the log-sum-exp (FlashAttention-2, Dao 2023, section 3.1.2). A bfloat16 product is
    accumulated in float32 but rounded to 8 bits, which would spoil the weight of a large score. Two additional columns
    therefore subtract a level inside the product, so that the result, and its rounding error, is near 0 where most of
    a query's weight lies: the log-sum-exp minus about the entropy of the weights. The same columns subtract ``delta``
    from the gradients of the weights. Gradients are summed over bands in float32.

    Shapes are those of :func:`memtx.ops.attention.dispatch.segment_attention`. ``lse`` (finite) and ``delta``, which
    is ``grad_out . out`` minus the gradient of ``lse``, are ``(batch, heads, queries)`` float32.
    """
    batch_size, heads, _, head_dim = q.shape
    group, num_sequences = heads // k.shape[1], batch_size * k.shape[1]

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
        num_queries, num_keys = band.mask.shape[-2:]
        band_q, band_grad_out = (x[:, :, band.queries].flatten(1, 2) for x in (all_q, all_grad_out))
        band_k, band_v = all_k[:, band.keys], all_v[:, band.keys]
        weights = q.new_empty(batch_size, heads, num_queries, num_keys).copy_(band.mask)
        weights = weights.view(num_sequences, group * num_queries, num_keys)
        weights.baddbmm_(band_q, band_k.transpose(1, 2), alpha=scale).exp_()
        grad_v[:, band.keys] += torch.bmm(weights.transpose(1, 2), band_grad_out[..., :head_dim])
        grad_scores = weights.mul_(torch.bmm(band_grad_out, band_v.transpose(1, 2)))
        grad_q[:, :, band.queries] += torch.bmm(grad_scores, band_k[..., :head_dim]).view(
            -1, group, num_queries, head_dim
        )
        grad_k[:, band.keys] += torch.bmm(grad_scores.transpose(1, 2), band_q[..., :head_dim])
    grads = (grad_q.mul_(scale), q), (grad_k.mul_(scale), k), (grad_v, v)
    grad_q, grad_k, grad_v = (grad.to(x.dtype).view(x.shape) for grad, x in grads)
    return grad_q, grad_k, grad_v


class _BandedSDPA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bands: list[Band], gathered: GatheredBlocks | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch_size, heads, num_queries, _ = q.shape
        # Laid out as (batch, queries, heads, head_dim), which the output projection reads without a copy.
        out = q.new_zeros(batch_size, num_queries, heads, v.shape[-1])
        dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((batch_size, num_queries, heads), float("-inf"), dtype=dtype, device=q.device)
        for _, block in groupby(bands, key=lambda band: band.queries.start):
            parts = []
            for band in block:
                queries = band.queries
                inputs = q[:, :, queries], k[:, :, band.keys], v[:, :, band.keys]
                parts.append(_attend_masked(*inputs, band.mask, band.fully_masked, scale))
            out[:, queries], lse[:, queries] = merge_attention(parts)
        if gathered is not None:
            block_out, block_lse = _attend_masked(
                gathered.split_queries(q), gathered.gather_keys(k), gathered.gather_keys(v), gathered.mask,
                gathered.fully_masked, scale,
            )  # fmt: skip
            out_part, lse_part = (gathered.join_queries(x, num_queries) for x in (block_out, block_lse))
            out, lse = merge_attention([(out, lse), (out_part, lse_part)])
        out = out.transpose(1, 2)
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
                return (None,) * 6
            grad_out = torch.zeros_like(out)
        # The weights of a fully masked query are exp(-inf - 0) = 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0).transpose(1, 2)
        plain = ctx.gathered is None and not any(band.has_bias for band in ctx.bands)
        if q.dtype == torch.bfloat16 and plain and is_bf16_backward_faster():
            delta = (grad_out.float() * out.float()).sum(-1)
            delta = delta if grad_lse is None else delta - grad_lse
            return *compute_bf16_grads(q, k, v, lse, delta, grad_out, ctx.bands, ctx.scale), None, None, None
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # The gradient of a score is weight * (grad_out v' - grad_out out' + grad_lse); the kernel computes all but
            # the last term. A column of 0 in v, 1 in grad_out and -grad_lse in out adds it.
            q, k, v, out, grad_out = (F.pad(x, (0, PAD_COLUMNS)) for x in (q, k, v, out, grad_out))
            grad_out[..., head_dim] = 1.0
            out[..., head_dim] = -grad_lse
        grads = tuple(x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
        for band in ctx.bands:
            queries, keys = band.queries, band.keys
            band_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries],
                lse[:, :, queries], 0.0, False, attn_mask=band.mask, scale=ctx.scale,
            )  # fmt: skip
            for grad, band_grad, tokens in zip(grads, band_grads, (queries, keys, keys), strict=True):
                grad[:, :, tokens] += band_grad
        if ctx.gathered is not None:
            _add_gathered_grads(ctx.gathered, (grad_out, q, k, v, out, lse), grads, ctx.scale)
        if grad_lse is not None:
            grads = tuple(grad[..., :head_dim] for grad in grads)
        return *grads, None, None, None


def _add_gathered_grads(
    gathered: GatheredBlocks, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...], scale: float
) -> None:
    """Add the gradients of the gathered blocks to those of the bands."""
    grad_out, q, k, v, out, lse = saved
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gathered.split_queries(grad_out), gathered.split_queries(q), gathered.gather_keys(k), gathered.gather_keys(v),
        gathered.split_queries(out), gathered.split_queries(lse[..., None])[..., 0], 0.0, False,
        attn_mask=gathered.mask, scale=scale,
    )  # fmt: skip
    grads[0].transpose(1, 2).add_(gathered.join_queries(grad_q.transpose(1, 2), q.shape[2]))
    gathered.scatter_add_keys(grads[1], grad_k)
    gathered.scatter_add_keys(grads[2], grad_v)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bands: list[Band], scale: float, gathered: GatheredBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp over bands and gathered blocks, both with gradient.

    Shapes are those of :func:`memtx.ops.attention.dispatch.segment_attention`.
    """
    out, lse = _BandedSDPA.apply(q, k, v, bands, gathered, scale)  # type: ignore[no-untyped-call]
    return out, lse
