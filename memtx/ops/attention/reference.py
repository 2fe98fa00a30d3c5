"""Attention as the papers write it: softmax(q k' / sqrt(d) + bias) v over the visible keys, nothing fused.

The twin that every fast backend is tested against (in float64), and the way to what they cannot do, such as
dropout on the attention weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import Bias, bias_of
from memtx.ops.visibility import Visibility, visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Bias | None = None,
    dropout: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention output and the log-sum-exp of the scores.

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
        scores = scores + bias_of(bias, visibility, (0, visibility.queries), (0, visibility.keys)).to(scores.dtype)
    seen = visible(visibility)[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # A query that sees nothing gets zero; finite stand-ins keep its gradient from being nan.
    nothing = ~seen.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    return F.dropout(weights, dropout) @ v, lse
