"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2), by ticks.

Only differences of angles matter, so the angles are those of ticks counted from the call's first token:
small numbers however long the stream is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(tick: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotations.

    Args:
        tick: (rows, entries), any real number.
        head_dim: even.
        base: the slowest rotation's period is about 2 pi times this.
        dtype: of the result; the angles themselves are float64.

    Returns:
        two tensors (rows, entries, 1, head_dim / 2).
    """
    inverse = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=tick.device) / head_dim)
    angle = tick.to(torch.float64)[..., None, None] * inverse
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x.

    Args:
        x: (rows, entries, heads, head_dim).
        cosine: (rows or 1, entries, 1, head_dim / 2).
        sine: likewise.

    Returns:
        like x, in x's dtype; computed in the angles' dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
