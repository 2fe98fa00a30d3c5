"""Joining attention over parts of the keys into attention over all, by the parts' log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the attention over the union of disjoint sets of keys, with gradient.

    Args:
        parts: for each set, its output (..., queries, head_dim) and its lse (..., queries), minus infinity
            where the query saw nothing.

    Returns:
        output and lse of the union; zero and minus infinity where no part saw anything.
    """
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack([part[1] for part in parts])
    # exp(-inf - -inf) is nan; where nothing was seen every weight is to be zero, and its gradient too.
    nothing = (stacked == float("-inf")).all(0)
    base = torch.logsumexp(stacked.masked_fill(nothing, 0.0), dim=0).masked_fill(nothing, 0.0)
    # In the lse's type, so that half-precision parts are added up in float32 and rounded once.
    output = parts[0][0] * torch.exp(parts[0][1] - base).unsqueeze(-1)
    for out, own in parts[1:]:
        output = output + out * torch.exp(own - base).unsqueeze(-1)
    return output.to(parts[0][0].dtype), base.masked_fill(nothing, float("-inf"))
