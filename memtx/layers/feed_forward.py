"""The position-wise feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memtx.ops.cpu.linear import Linear


class SwiGLU(nn.Module):
    """Gated by a SiLU, or another non-linearity (GLU variants, Shazeer 2020).

    Args:
        dim: width of the hidden states.
        hidden_dim: inner width; by default 8/3 dim, rounded up to a multiple of 64, so that the parameters are
            about those of the classic one.
        dropout: on the inner states.
        bias: whether the maps have biases.
        activation: makes the gate's non-linearity.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim if hidden_dim is not None else -(-8 * dim // (3 * 64)) * 64
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=bias)
        self.out = Linear(hidden_dim, dim, bias=bias)
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, segment, dim) to the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.out(self.dropout(self.activation(gate) * up))
        return out


class FeedForward(nn.Module):
    """Two linear maps with a GELU between (Vaswani et al. 2017, section 3.3; Hendrycks and Gimpel 2016).

    Args:
        dim: width of the hidden states.
        hidden_dim: inner width, 4 dim by default.
        dropout: on the inner states.
        activation: makes what stands between the maps.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim if hidden_dim is not None else 4 * dim
        self.activation = activation()
        self.up = Linear(dim, hidden_dim)
        self.out = Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, segment, dim) to the same shape."""
        out: Tensor = self.out(self.dropout(self.activation(self.up(x))))
        return out


def reset_linear(module: nn.Module, std: float, residual_std: float) -> None:
    """Draw the weights of a feed-forward part: normal, its last map (named ``out``) narrower.

    Args:
        module: any module; linear maps within it are drawn, biases zeroed.
        std: of all maps but the last.
        residual_std: of the map that adds to the residual stream.
    """
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=residual_std if name == "out" else std)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
