"""Norms of published layouts that torch does not have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memtx.ops.cpu.elementwise import rms_norm


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """An RMS norm whose stored weight is the factor minus 1, as in Gemma and Qwen 3.5.

    Args:
        dim: Width of the inputs.
        eps: Epsilon.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.norm_eps = eps
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(..., dim)``; computed in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(wide, 1.0 + self.weight.to(wide.dtype), self.norm_eps).to(x.dtype)


class JointHeadNorm(nn.Module):
    """A norm over all heads of a token at once, as in OLMo.

    Args:
        norm: Factory of the norm, given the width of all heads.
        heads: Number of heads.
        head_dim: Width of a head.
    """

    def __init__(self, norm: Callable[[int], nn.Module], heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = norm(heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(..., heads, head_dim)``."""
        out: Tensor = self.norm(x.flatten(-2)).view(x.shape)
        return out
