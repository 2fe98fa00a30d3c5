"""Log-weights of keys, as one more column of queries and keys: every backend can add them to the scores so."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PAD_COLUMNS = 8
"""Columns added to a head; only the first is used, eight keep rows aligned."""


def append_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values whose attention has the weights in it, PAD_COLUMNS more columns in its output.

    Args:
        q: (rows, queries, heads, head_dim).
        k: (rows, keys, kv_heads, head_dim).
        v: (rows, keys, kv_heads, head_dim).
        key_bias: (rows, n), added to the scaled scores of the first n keys, by every query and head.
        scale: what attention will multiply scores with; to be given to it, for widths have changed.
    """
    column = F.pad(key_bias.to(k.dtype) / scale, (0, k.shape[1] - key_bias.shape[1]))[..., None, None]
    k = torch.cat([k, column.expand(-1, -1, k.shape[2], 1)], dim=-1)
    q = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1)
    return F.pad(q, (0, PAD_COLUMNS - 1)), F.pad(k, (0, PAD_COLUMNS - 1)), F.pad(v, (0, PAD_COLUMNS))
