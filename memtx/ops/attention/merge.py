"""Joining attention over parts of the keys into attention over all, by the parts' log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the attention over the union of disjoint sets of keys.

    Args:
        parts: for each set, its output (..., queries, head_dim) and its lse (..., queries), minus infinity
            where the query saw nothing.

    Returns:
        output and lse of the union; zero and minus infinity where no part saw anything.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), dim=0)
    # exp(-inf - -inf) is nan; where nothing was seen every weight is to be zero.
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    # In the lse's type, so that half-precision parts are added up in float32 and rounded once.
    output = parts[0][0] * torch.exp(parts[0][1] - base).unsqueeze(-1)
    for out, own in parts[1:]:
        output = output + out * torch.exp(own - base).unsqueeze(-1)
    return output.to(parts[0][0].dtype), lse
