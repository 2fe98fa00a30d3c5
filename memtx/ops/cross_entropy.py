"""Output projection and cross entropy in chunks of tokens, so that whole logits never exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a token that is not scored."""

CHUNK = 1 << 22
"""Logits a chunk at most (16 MiB in float32)."""


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Return the negative log-likelihood of each label.

    Args:
        hidden: (tokens, dim).
        weight: (vocab, dim), the output projection.
        labels: (tokens,) int64; -100 where nothing is scored.
        chunk: logits held at a time, at most; each chunk but a lone one is computed again for its gradient.

    Returns:
        (tokens,) float32 (float64 for float64 input), 0 where nothing is scored.
    """
    tokens = max(1, chunk // weight.shape[0])
    if hidden.shape[0] <= tokens:
        return _chunk(hidden, weight, labels)
    parts = [
        checkpoint(
            _chunk,
            hidden[i : i + tokens],
            weight,
            labels[i : i + tokens],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(0, hidden.shape[0], tokens)
    ]
    return torch.cat(parts)
