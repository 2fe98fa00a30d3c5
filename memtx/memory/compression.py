"""Functions that turn a block of hidden states into one entry (Compressive Transformer, Rae et al. 2020, section 3.1).

Each is a function of the block alone, so an entry depends on positions and not on how the stream was cut.
The learned ones begin as mean pooling, the best compression that has nothing to learn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.cpu.linear import Linear


class Compression(nn.Module, ABC):
    """From ``compression_rate`` hidden states to one.

    Args:
        dim: width of the hidden states.
        compression_rate: states in a block.
    """

    needs_usage = False
    """Whether ``forward`` is to be given how much attention each state of the block receives."""

    supports_any_rate = False
    """Whether blocks of any number of states can be given, whatever the rate it was made for."""

    def __init__(self, dim: int, compression_rate: int) -> None:
        super().__init__()
        self.dim = dim
        self.compression_rate = compression_rate

    @abstractmethod
    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Compress (rows, blocks, compression_rate, dim) to (rows, blocks, dim).

        Args:
            blocks: hidden states.
            usage: (rows, blocks, compression_rate), where ``needs_usage``.
        """


class MeanPooling(Compression):
    """The block's mean."""

    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Average."""
        return blocks.mean(dim=2)


class MaxPooling(Compression):
    """The block's greatest value, channel by channel."""

    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Take the maximum."""
        return blocks.amax(dim=2)


class StridedConvolution(Compression):
    """A convolution whose kernel and stride are the rate: one linear map of the whole block."""

    def __init__(self, dim: int, compression_rate: int) -> None:
        super().__init__(dim, compression_rate)
        self.proj = Linear(compression_rate * dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as mean pooling."""
        with torch.no_grad():
            one = torch.eye(self.dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
            self.proj.weight.copy_(one.repeat(1, self.compression_rate) / self.compression_rate)
            self.proj.bias.zero_()

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Map the block's states, side by side."""
        out: Tensor = self.proj(blocks.flatten(2))
        return out


class DilatedConvolution(Compression):
    """Convolutions of dilation 1, 2, 4, ... until all of the block is in reach, added to its mean."""

    def __init__(self, dim: int, compression_rate: int, kernel_size: int = 3) -> None:
        super().__init__(dim, compression_rate)
        # Layer i reaches kernel_size // 2 * 2^i to each side; together they are to reach the whole block.
        depth = max(1, math.ceil(math.log2(compression_rate))) if compression_rate > 1 else 1
        self.layers = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel_size, padding=(kernel_size // 2) * 2**i, dilation=2**i) for i in range(depth)
        )
        self.out = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as mean pooling: what is added to the mean begins at zero."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Convolve within each block."""
        rows, count, rate, dim = blocks.shape
        x = blocks.reshape(rows * count, rate, dim).transpose(1, 2)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        out: Tensor = blocks.mean(dim=2) + self.out(x.mean(dim=2).view(rows, count, dim))
        return out


class MostUsed(Compression):
    """The one state of the block that gets the most attention.

    The paper ranks by attention received so far, which depends on every earlier compression. Here usage is
    what the layer's own queries of the newest ``compression_rate`` positions give to the block's states as it leaves
    the window, so that it is a function of positions and all blocks are ranked at once.
    """

    needs_usage = True
    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Select the most used state."""
        assert usage is not None
        best = usage.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, self.dim)
        return blocks.gather(2, best).squeeze(2)


class AttentionPooling(Compression):
    """Cross attention from learned queries, one a head, to the block's states.

    Args:
        dim: width of the hidden states.
        compression_rate: states in a block.
        heads: parts of the width that are weighted apart.

    Raises:
        MemtxError: the heads do not divide the width.
    """

    def __init__(self, dim: int, compression_rate: int, heads: int = 4) -> None:
        super().__init__(dim, compression_rate)
        if dim % heads:
            raise MemtxError(f"{heads} heads do not divide a width of {dim}.", "Choose a divisor.")
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.key = Linear(dim, dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(heads, compression_rate))
        self.value = Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as mean pooling: queries of zero weigh all states alike, values pass unchanged."""
        nn.init.zeros_(self.query)
        nn.init.zeros_(self.position_bias)
        nn.init.eye_(self.value.weight)

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Attend to each block."""
        key, value = (part(blocks).unflatten(-1, (self.heads, -1)) for part in (self.key, self.value))
        score = torch.einsum("rbchd,hd->rbhc", key, self.query.to(key.dtype)) * key.shape[-1] ** -0.5
        weight = torch.softmax(score + self.position_bias.to(score.dtype), dim=-1)
        return torch.einsum("rbhc,rbchd->rbhd", weight, value).flatten(2)
