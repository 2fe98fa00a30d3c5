"""Compressions of a block of hidden states to one entry, and losses that train them (Rae et al. 2020, section 3.1).

Learned compressions start as mean pooling, the best one without weights. The losses (section 3.2) detach their inputs
and freeze the layer's projections, so they train only the compression; the language model's loss trains all weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_divisible
from memtx.memory.base import ContentAttention
from memtx.ops.cpu.linear import Linear


class Compression(nn.Module, ABC):
    """A map from ``compression_rate`` hidden states to one.

    Args:
        dim: Width of the hidden states.
        compression_rate: States per block.
    """

    __call__: Callable[..., Tensor]

    needs_usage = False
    """If True, ``forward`` needs the attention that each state of a block receives."""

    supports_any_rate = False
    """If True, blocks of any length are accepted, not just those of ``compression_rate`` states."""

    def __init__(self, dim: int, compression_rate: int) -> None:
        super().__init__()
        self.dim = dim
        self.compression_rate = compression_rate

    @abstractmethod
    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Compress ``(batch, blocks, compression_rate, dim)`` to ``(batch, blocks, dim)``.

        ``usage`` is the attention to each state, ``(batch, blocks, compression_rate)``, if ``needs_usage``.
        """


class MeanPooling(Compression):
    """The mean of the block."""

    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Return the mean."""
        return blocks.mean(dim=2)


class MaxPooling(Compression):
    """The maximum of the block, channel by channel."""

    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Return the maximum."""
        return blocks.amax(dim=2)


class StridedConvolution(Compression):
    """A convolution with kernel and stride equal to the rate: one linear map of the whole block."""

    def __init__(self, dim: int, compression_rate: int) -> None:
        super().__init__(dim, compression_rate)
        self.proj = Linear(compression_rate * dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as mean pooling."""
        with torch.no_grad():
            identity = torch.eye(self.dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
            self.proj.weight.copy_(identity.repeat(1, self.compression_rate) / self.compression_rate)
            self.proj.bias.zero_()

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Project the concatenated states."""
        return self.proj(blocks.flatten(2))


class DilatedConvolution(Compression):
    """The block's mean plus convolutions of dilation 1, 2, 4, ... that reach the whole block."""

    def __init__(self, dim: int, compression_rate: int, kernel_size: int = 3) -> None:
        super().__init__(dim, compression_rate)
        # Layer i reaches kernel_size // 2 * 2^i states to each side; together they must reach the whole block.
        depth = max(1, math.ceil(math.log2(compression_rate)))
        self.layers = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel_size, padding=(kernel_size // 2) * 2**i, dilation=2**i) for i in range(depth)
        )
        self.out = Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as mean pooling: the term added to the mean is zero."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Convolve within each block."""
        x = blocks.flatten(0, 1).transpose(1, 2)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return blocks.mean(dim=2) + self.out(x.mean(dim=2).view(*blocks.shape[:2], -1))


class MostUsed(Compression):
    """The state of the block that gets the most attention.

    The paper ranks by attention received so far, which depends on every earlier compression. Here a state's usage is
    the attention from the layer's queries of the newest ``compression_rate`` positions when the block is evicted. That
    is a function of positions, and all blocks are ranked at once.
    """

    needs_usage = True
    supports_any_rate = True

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Select the most used state."""
        assert usage is not None
        index = usage.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, self.dim)
        return blocks.gather(2, index).squeeze(2)


class AttentionPooling(Compression):
    """Attention pooling by one learned query per head; raises MemtxError if dim is not divisible by heads."""

    def __init__(self, dim: int, compression_rate: int, heads: int = 4) -> None:
        super().__init__(dim, compression_rate)
        check_divisible("Choose a divisor for AttentionPooling's heads.", dim=dim, heads=heads)
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.key = Linear(dim, dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(heads, compression_rate))
        self.value = Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as mean pooling: zero queries weigh all states equally and values pass unchanged."""
        nn.init.zeros_(self.query)
        nn.init.zeros_(self.position_bias)
        nn.init.eye_(self.value.weight)

    def forward(self, blocks: Tensor, usage: Tensor | None = None) -> Tensor:
        """Attend to the states of each block."""
        key, value = (proj(blocks).view(*blocks.shape[:-1], self.heads, -1) for proj in (self.key, self.value))
        scores = torch.einsum("bnchd,hd->bnhc", key, self.query.to(key.dtype)) * key.shape[-1] ** -0.5
        weights = torch.softmax(scores + self.position_bias.to(scores.dtype), dim=-1)
        return torch.einsum("bnhc,bnchd->bnhd", weights, value).flatten(2)


class Reconstruction(nn.Module, ABC):
    """A loss between blocks and their compressed entries.

    Args:
        dim: Width of the hidden states.
        compression_rate: States per block.
        weight: Weight of the loss.

    Attributes:
        name: Key of the loss among the auxiliary losses.
    """

    name: str

    def __init__(self, dim: int, compression_rate: int, weight: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.compression_rate = compression_rate
        self.weight = weight

    @abstractmethod
    def forward(
        self, blocks: Tensor, entries: Tensor, valid: Tensor, queries: Tensor, attention: ContentAttention
    ) -> Tensor:
        """Return the weighted loss, 0 if no block is valid.

        Args:
            blocks: Blocks of states, detached, ``(batch, blocks, compression_rate, dim)``.
            entries: Entries compressed from ``blocks``, ``(batch, blocks, dim)``.
            valid: Blocks that were evicted in this call, ``(batch, blocks)`` bool.
            queries: Attention inputs of the segment, detached, ``(batch, length, dim)``.
            attention: The layer's projections.
        """


class AutoEncoding(Reconstruction):
    """The mean squared error of a block decoded linearly from its entry."""

    name = "auto_encoding"

    def __init__(self, dim: int, compression_rate: int, weight: float = 1.0) -> None:
        super().__init__(dim, compression_rate, weight)
        self.decoder = Linear(dim, compression_rate * dim)

    def forward(
        self, blocks: Tensor, entries: Tensor, valid: Tensor, queries: Tensor, attention: ContentAttention
    ) -> Tensor:
        """Decode the entries and compare them with the blocks."""
        error = (self.decoder(entries).view(blocks.shape) - blocks).square().mean(dim=(2, 3))
        return self.weight * (error * valid).sum() / valid.sum().clamp(min=1)


class AttentionReconstruction(Reconstruction):
    """The mean squared difference between the segment's attention to the blocks and to their entries.

    The attention is by content, without positions, as in the paper's algorithm 2.
    """

    name = "attention_reconstruction"

    def forward(
        self, blocks: Tensor, entries: Tensor, valid: Tensor, queries: Tensor, attention: ContentAttention
    ) -> Tensor:
        """Attend to the blocks and to the entries and compare."""
        q = attention.project(queries, "query", frozen=True)
        exact = _attend(q, blocks.flatten(1, 2), valid.repeat_interleave(self.compression_rate, dim=1), attention)
        compressed = _attend(q, entries, valid, attention)
        has_valid = valid.any(dim=1)
        error = (exact - compressed).square().mean(dim=(1, 2, 3))
        return self.weight * (error * has_valid).sum() / has_valid.sum().clamp(min=1)


def _attend(q: Tensor, entries: Tensor, valid: Tensor, attention: ContentAttention) -> Tensor:
    k, v = (attention.project(entries, projection, frozen=True) for projection in ("key", "value"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    # A softmax over no valid entry would be NaN; such a sequence sees all of them and its error is not counted.
    hidden = ~(valid | ~valid.any(dim=1, keepdim=True))
    weights = torch.softmax(scores.masked_fill(hidden[:, None, None], float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
