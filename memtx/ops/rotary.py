"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2), by ticks.

Only differences of angles matter, so the angles are those of ticks counted from the call's first token:
small numbers however long the stream is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(tick: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines of the rotations.

    Args:
        tick: (rows, entries), any real number.
        head_dim: even.
        base: the slowest rotation's period is about 2 pi times this.
        dtype: of the result, float32 or float64; the angles themselves are float64.

    Returns:
        (rows, entries, 1, head_dim / 2, 2): the cosine, then the sine.
    """
    return turned_by(
        tick, base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=tick.device) / head_dim), dtype
    )


def turned_by(tick: Tensor, inverse: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Return the same for pairs that turn by ``inverse`` (head_dim / 2,) float64 a tick, times ``factor``."""
    angle = tick.to(torch.float64)[..., None, None] * inverse
    return (torch.stack([angle.cos(), angle.sin()], dim=-1) * factor).to(dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x, as equation 34 does.

    Args:
        x: (rows, entries, heads, head_dim).
        turn: (rows or 1, entries, 1, head_dim / 2, 2), of :func:`angles`.

    Returns:
        like x, in x's dtype; computed in the angles' dtype.
    """
    pairs = x.to(turn.dtype)
    pairs = pairs.view(*pairs.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # The compiler makes no code for complex numbers.
        (first, second), (cosine, sine) = pairs.unbind(-1), turn.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    else:
        # A product of complex numbers is one pass over x: on a CPU some ten times faster than the line above.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.flatten(-2).to(x.dtype)
