"""Combining attention over parts of the keys by log-sum-exp, and key biases as an additional column."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PAD_COLUMNS = 8
"""Columns added per head; only the first is used, eight keep the heads aligned in memory."""


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union, with gradient.

    Args:
        parts: Output ``(..., queries, head_dim)`` and log-sum-exp ``(..., queries)`` of each set, the latter minus
            infinity for fully masked queries.

    Returns:
        Output and log-sum-exp of the union, zero and minus infinity for queries masked in all parts.
    """
    if len(parts) == 1:
        return parts[0]
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


def append_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Append a column to queries and keys that adds a bias per key to the scores, in any backend.

    The inputs, and the output of their attention, get PAD_COLUMNS additional columns.

    Args:
        q: ``(batch, queries, heads, head_dim)``.
        k: ``(batch, keys, kv_heads, head_dim)``.
        v: ``(batch, keys, kv_heads, head_dim)``.
        key_bias: ``(batch, n)``, added to the scaled scores of the first n keys for every query and head.
        scale: Factor of the scores; pass it to attention as well, since its default depends on the head dimension.
    """
    column = F.pad(key_bias.to(k.dtype) / scale, (0, k.shape[1] - key_bias.shape[1]))[..., None, None]
    k = torch.cat([k, column.expand(-1, -1, k.shape[2], 1)], dim=-1)
    q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
    return F.pad(q, (0, PAD_COLUMNS - 1)), F.pad(k, (0, PAD_COLUMNS - 1)), F.pad(v, (0, PAD_COLUMNS))
