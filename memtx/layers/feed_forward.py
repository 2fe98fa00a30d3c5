"""Position-wise feed-forward parts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from memtx.ops.cpu.elementwise import swiglu
from memtx.ops.cpu.linear import Linear


class SwiGLU(nn.Module):
    """A feed-forward part gated by a SiLU or another activation (GLU variants, Shazeer 2020).

    Args:
        dim: Width of the hidden states.
        hidden_dim: Inner width. Defaults to 8/3 dim, rounded up to a multiple of 64, which gives about as many
            parameters as :class:`FeedForward` has.
        dropout: Dropout rate of the inner states.
        bias: If True, the projections have biases.
        activation: Factory of the gate's activation.
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
        """Map ``(batch, length, dim)`` to the same shape."""
        gate_up = self.gate_up(x)
        if isinstance(self.activation, nn.SiLU):
            return self.out(self.dropout(swiglu(gate_up)))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.out(self.dropout(self.activation(gate) * up))


class FeedForward(nn.Module):
    """Two projections with an activation between them (Vaswani et al. 2017, section 3.3).

    The default activation is GELU (Hendrycks and Gimpel 2016).

    Args:
        dim: Width of the hidden states.
        hidden_dim: Inner width. Defaults to 4 * dim.
        dropout: Dropout rate of the inner states.
        activation: Factory of the activation.
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
        """Map ``(batch, length, dim)`` to the same shape."""
        return self.out(self.dropout(self.activation(self.up(x))))


def reset_linear(module: nn.Module, std: float, residual_std: float) -> None:
    """Initialize the linear layers of a feed-forward part: normal weights, zero biases.

    The standard deviation is ``residual_std`` in layers named ``out``, which add to the residual stream.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=residual_std if name == "out" else std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
