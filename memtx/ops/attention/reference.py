"""Attention as in the papers, softmax(scale * q k' + bias) v over the visible keys, without fused kernels.

All other backends are tested against it, in float64. Attention over parts of the keys can be merged by log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias, compute_block_bias
from memtx.ops.attention.mask import Visibility, compute_key_counts


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Repeat ``(batch, kv_heads, keys, head_dim)`` to ``heads`` heads; query head h reads h // (heads // kv_heads)."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def softmax_attention(scores: Tensor, mask: Tensor, v: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return softmax(scores) v over the visible keys and the log-sum-exp of the scores, both with gradient.

    They are ``(..., queries, head_dim)`` in the dtype of v and ``(..., queries)``, zero and minus infinity for fully
    masked queries. ``scores`` is ``(..., queries, keys)``, ``v`` ``(..., keys, head_dim)``, and ``mask``, broadcastable
    to the scores, True for visible keys. ``dropout`` is the rate of the attention weights.
    """
    scores = scores.masked_fill(~mask, float("-inf"))
    # Finite scores of fully masked queries prevent NaN gradients.
    fully_masked = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(fully_masked, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(fully_masked, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(fully_masked[..., 0], float("-inf"))
    return F.dropout(weights, dropout).to(v.dtype) @ v, lse


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union, with gradient.

    A part is the output ``(..., queries, head_dim)`` and log-sum-exp ``(..., queries)`` of one set, the latter minus
    infinity for fully masked queries. Queries masked in all parts get zero and minus infinity.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return _merge_two(*parts)
    stacked = torch.stack([lse for _, lse in parts])
    # exp(-inf - -inf) is nan; a query masked in all parts needs zero weights and zero gradients.
    fully_masked = (stacked == float("-inf")).all(0)
    merged_lse = torch.logsumexp(stacked.masked_fill(fully_masked, 0.0), dim=0).masked_fill(fully_masked, 0.0)
    # In the dtype of the log-sum-exp: half-precision parts are added in float32 and rounded once.
    first_out, first_lse = parts[0]
    merged = first_out * torch.exp(first_lse - merged_lse).unsqueeze(-1)
    for out, lse in parts[1:]:
        merged = merged + out * torch.exp(lse - merged_lse).unsqueeze(-1)
    return merged.to(first_out.dtype), merged_lse.masked_fill(fully_masked, float("-inf"))


def _merge_two(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two parts as :func:`merge_attention` does, in a third of its time."""
    (out, lse), (other_out, other_lse) = first, second
    is_masked = other_lse == float("-inf")
    share = torch.sigmoid((other_lse - lse).masked_fill(is_masked, float("-inf")))[..., None]
    merged = torch.lerp(out.to(share.dtype), other_out.to(share.dtype), share)
    fully_masked = is_masked & (lse == float("-inf"))
    lse, other_lse = lse.masked_fill(fully_masked, 0.0), other_lse.masked_fill(fully_masked, 0.0)
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse).masked_fill(fully_masked, float("-inf"))


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility,
    *, bias: ScoreBias | None = None, dropout: float = 0.0, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention and its log-sum-exp, both with gradient.

    Arguments and results are those of :func:`memtx.ops.attention.dispatch.segment_attention`.
    """
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        block_bias = compute_block_bias(bias, (0, visibility.num_queries), (0, visibility.num_keys))
        scores = scores + block_bias.to(scores.dtype)
    counts = compute_key_counts(visibility, q.shape[1])
    if visibility.pattern is not None and visibility.pattern.count_duplicates:
        # A key that counts n times equals n keys with the same score.
        scores = scores + counts.clamp(min=1).to(scores.dtype).log()
    return softmax_attention(scores, counts > 0, v, dropout)
