"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2), by ticks.

Only differences of angles matter, so the angles are those of ticks counted from the call's first token:
small numbers however long the stream is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles_from_base(offset: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines of the rotations.

    Args:
        offset: (rows, entries), any real number.
        head_dim: even.
        base: the slowest rotation's period is about 2 pi times this.
        dtype: of the result, float32 or float64; the angles themselves are float64.

    Returns:
        (rows, entries, 1, head_dim / 2, 2): the cosine, then the sine.
    """
    return rotary_angles(
        offset, base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=offset.device) / head_dim), dtype
    )


def rotary_angles(offset: Tensor, inv_freq: Tensor, dtype: torch.dtype, attention_factor: float = 1.0) -> Tensor:
    """Return the same of pairs that turn by ``inv_freq`` (head_dim / 2,) float64 a tick, times ``attention_factor``."""
    angle = offset.to(torch.float64)[..., None, None] * inv_freq
    return (torch.stack([angle.cos(), angle.sin()], dim=-1) * attention_factor).to(dtype)


def apply_rotary_emb(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x, as equation 34 does.

    Args:
        x: (rows, entries, heads, head_dim).
        cos_sin: (rows or 1, entries, 1, head_dim / 2, 2), of :func:`rotary_angles`.

    Returns:
        like x, in x's dtype; computed in the angles' dtype.
    """
    pairs = x.to(cos_sin.dtype)
    pairs = pairs.view(*pairs.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # The compiler makes no code for complex numbers.
        (first, second), (cosine, sine) = pairs.unbind(-1), cos_sin.unbind(-1)
        turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    else:
        # A product of complex numbers is one pass over x: on a CPU some ten times faster than the line above.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
    return turned.flatten(-2).to(x.dtype)
