"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2).

Only differences of angles matter, so angles are computed from offsets within the call, which stay small in streams of
any length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(offset: Tensor, inv_freq: Tensor, dtype: torch.dtype, attention_factor: float = 1.0) -> Tensor:
    """Compute the cosines, then sines, of the rotations, ``(batch, entries, 1, head_dim / 2, 2)``.

    Args:
        offset: ``(batch, entries)`` of any dtype.
        inv_freq: ``(head_dim / 2,)`` float64, angle per token for each pair of dimensions.
        dtype: Dtype of the result, float32 or float64; the angles themselves are float64.
        attention_factor: Factor applied to the result.
    """
    angle = offset.to(torch.float64)[..., None, None] * inv_freq
    return (torch.stack([angle.cos(), angle.sin()], dim=-1) * attention_factor).to(dtype)


def apply_rotary_emb(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x, ``(batch, entries, heads, head_dim)`` (equation 34).

    ``cos_sin``, ``(batch or 1, entries, 1, head_dim / 2, 2)``, is from :func:`rotary_angles`; the result is computed in
    its dtype and returned in that of x.
    """
    pairs = x.to(cos_sin.dtype)
    pairs = pairs.view(*pairs.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # The compiler generates no code for complex numbers.
        (first, second), (cosine, sine) = pairs.unbind(-1), cos_sin.unbind(-1)
        rotated = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    else:
        # One pass over x by a complex product: about ten times faster on a CPU.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
    return rotated.flatten(-2).to(x.dtype)
