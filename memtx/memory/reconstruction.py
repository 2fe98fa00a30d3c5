"""Auxiliary losses that teach a compression to keep what was there (Compressive Transformer, section 3.2).

The inputs are cut from the graph and the layer's projections are used frozen, so only the compression (and an
auto-encoder's decoder) learns from these losses. Nothing is detached in place: every other weight goes on
learning from the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention
from memtx.ops.cpu.linear import Linear


class Reconstruction(nn.Module, ABC):
    """A loss between blocks and their compressed entries.

    Args:
        dim: width of the hidden states.
        compression_rate: states in a block.
        weight: factor of the loss.
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
        """Return the weighted loss, 0 where no block is valid.

        Args:
            blocks: (rows, blocks, compression_rate, dim), detached.
            entries: (rows, blocks, dim), compressed from ``blocks``.
            valid: (rows, blocks) bool, which of them really left the window.
            queries: (rows, segment, dim), the segment's attention inputs, detached.
            attention: the layer's projections.
        """


class AutoEncoding(Reconstruction):
    """Mean squared error of the block decoded from its entry by a linear map."""

    name = "auto_encoding"

    def __init__(self, dim: int, compression_rate: int, weight: float = 1.0) -> None:
        super().__init__(dim, compression_rate, weight)
        self.decoder = Linear(dim, compression_rate * dim)

    def forward(
        self, blocks: Tensor, entries: Tensor, valid: Tensor, queries: Tensor, attention: ContentAttention
    ) -> Tensor:
        """Decode and compare."""
        error = (
            (self.decoder(entries).unflatten(-1, (self.compression_rate, self.dim)) - blocks).square().mean(dim=(2, 3))
        )
        loss: Tensor = self.weight * (error * valid).sum() / valid.sum().clamp(min=1)
        return loss


class AttentionReconstruction(Reconstruction):
    """Mean squared difference of what the segment's queries read from the blocks and from their entries.

    The attention is by content, without positions, as in the paper's algorithm 2.
    """

    name = "attention_reconstruction"

    def forward(
        self, blocks: Tensor, entries: Tensor, valid: Tensor, queries: Tensor, attention: ContentAttention
    ) -> Tensor:
        """Attend to both and compare."""
        q = attention.project(queries, "query", frozen=True)
        old = _attend(q, blocks.flatten(1, 2), valid.repeat_interleave(self.compression_rate, dim=1), attention)
        new = _attend(q, entries, valid, attention)
        some = valid.any(dim=1)
        error = (old - new).square().mean(dim=(1, 2, 3))
        return self.weight * (error * some).sum() / some.sum().clamp(min=1)


def _attend(q: Tensor, entries: Tensor, valid: Tensor, attention: ContentAttention) -> Tensor:
    k, v = (attention.project(entries, part, frozen=True) for part in ("key", "value"))
    score = torch.einsum("rqhd,rkhd->rhqk", q, k) * q.shape[-1] ** -0.5
    # A row without valid entries would be a softmax over nothing; its error is not counted.
    hidden = ~(valid | ~valid.any(dim=1, keepdim=True))
    weight = torch.softmax(score.masked_fill(hidden[:, None, None], float("-inf")), dim=-1)
    return torch.einsum("rhqk,rkhd->rqhd", weight, v)
