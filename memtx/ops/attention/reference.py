"""Attention as the papers write it: softmax(q k' / sqrt(d) + bias) v over the visible keys, nothing fused.

The twin that every fast backend is tested against (in float64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias, compute_block_bias
from memtx.ops.attention.mask import Visibility, compute_key_counts


def softmax_attention(scores: Tensor, mask: Tensor, v: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return softmax(scores) v over what is seen, and the log-sum-exp; all with gradient.

    Args:
        scores: (..., queries, keys).
        mask: bool, broadcasts to the scores.
        v: (..., keys, head_dim).
        dropout: probability with which a weight is dropped.

    Returns:
        (..., queries, head_dim) in v's type, zero for a query that sees nothing, and (..., queries), minus
        infinity there.
    """
    scores = scores.masked_fill(~mask, float("-inf"))
    # A query that sees nothing gets zero; finite stand-ins keep its gradient from being nan.
    nothing = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(nothing, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(nothing[..., 0], float("-inf"))
    return F.dropout(weights, dropout).to(v.dtype) @ v, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention output and the log-sum-exp of the scores, both with gradient.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim); query head h reads key head ``h // (heads // kv_heads)``.
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores.
        dropout: probability with which an attention weight is dropped.
        scale: factor of the scores.

    Returns:
        output (rows, heads, queries, head_dim), zero for a query that sees nothing, and lse
        (rows, heads, queries), minus infinity there.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + compute_block_bias(bias, (0, visibility.num_queries), (0, visibility.num_keys)).to(
            scores.dtype
        )
    times = compute_key_counts(visibility)
    if visibility.pattern is not None and visibility.pattern.count_duplicates:
        # A key that counts n times is n keys of one score.
        scores = scores + times.clamp(min=1).to(scores.dtype).log()
    return softmax_attention(scores, times > 0, v, dropout)
