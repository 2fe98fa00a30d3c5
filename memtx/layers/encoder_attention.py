"""Bidirectional attention over whole texts: the shared base of the encoders' attentions, and full attention.

The patterns of Longformer and BigBird are in files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from memtx.errors import check_divisible
from memtx.layers.encoder_inputs import EncoderInputs
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear


class EncoderAttention(nn.Module, ABC):
    """Self-attention over the tokens of a text (Vaswani et al. 2017, section 3.2.2).

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        layer_index: Index of the layer, from 0.
        bias: If True, the query, key and value projections have biases; the output projection always has one.
        dropout: Dropout rate of the attention weights.
        backend: Attention backend.

    Raises:
        MemtxError: dim is not divisible by heads.
    """

    supports_global_attention = False
    """If True, tokens can be marked as global."""

    supports_random_blocks = False
    """If True, random blocks can be given."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layer_index: int = 0,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        check_divisible(dim=dim, heads=heads)
        self.heads = heads
        self.layer_index = layer_index
        self.dropout_rate = dropout
        self.backend: AttentionBackend = backend
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, dim, bias=bias)
        self.value = Linear(dim, dim, bias=bias)
        self.out = Linear(dim, dim)

    @property
    def dropout(self) -> float:
        """Current dropout rate: 0 in eval mode."""
        return self.dropout_rate if self.training else 0.0

    def forward(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Attend to the text.

        Args:
            x: Hidden states, ``(batch, length, dim)``.
            inputs: Masks of the batch.

        Returns:
            ``(batch, length, dim)``.
        """
        out: Tensor = self.out(self.attend(x, inputs))
        return out

    @abstractmethod
    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated, in the same shape."""

    def attention_scores(self, x: Tensor, queries: slice, keys: slice) -> Tensor:
        """Return the scaled scores between slices of x, ``(batch, heads, queries, keys)``, without any mask."""
        q, k = self.split_heads(self.query(x[:, queries])), self.split_heads(self.key(x[:, keys]))
        out: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return out

    def within_window(self, distance: Tensor) -> Tensor | None:
        """Return True where tokens at a distance see each other, global tokens aside.

        Args:
            distance: Position of the key minus that of the query, int64 of any shape.

        Returns:
            bool of that shape, or None if visibility is not a function of distance.
        """
        return None

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape ``(batch, n, dim)`` to ``(batch, heads, n, head_dim)``."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of x, each ``(batch, heads, length, head_dim)``."""
        return self.split_heads(self.query(x)), self.split_heads(self.key(x)), self.split_heads(self.value(x))

    def attend_visible(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        """Attend to the visible keys; q, k, v and the result are ``(batch, heads, n, head_dim)``."""
        return segment_attention(q, k, v, visibility, dropout=self.dropout, backend=self.backend)[0]


class FullAttention(EncoderAttention):
    """Attention in which every token sees every other (BERT, Devlin et al. 2019)."""

    def within_window(self, distance: Tensor) -> Tensor:
        """Return True everywhere."""
        return torch.ones_like(distance, dtype=torch.bool)

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated, in the same shape."""
        return merge_heads(self.attend_visible(*self.project(x), full_visibility(inputs, inputs.length)))


def merge_heads(x: Tensor) -> Tensor:
    """Reshape ``(batch, heads, n, head_dim)`` to ``(batch, n, dim)``."""
    return x.transpose(1, 2).flatten(2)


def full_visibility(inputs: EncoderInputs, num_queries: int) -> Visibility:
    """Return the visibility of ``num_queries`` queries that see every token of the text."""

    def compute() -> Visibility:
        visible_from = torch.zeros(1, inputs.length, dtype=torch.int64, device=inputs.device)
        visible_until = visible_from + num_queries
        if inputs.attention_mask is not None:
            visible_until = torch.where(inputs.attention_mask, visible_until, 0)
            visible_from = visible_from.expand_as(visible_until)
        return Visibility(visible_from, visible_until, num_queries, (KeyRange(inputs.length),))

    return inputs.memo(("full", num_queries), compute)
