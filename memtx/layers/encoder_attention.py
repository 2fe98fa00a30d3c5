"""Attention over a whole text, both ways: projections, and who sees whom as a pattern; here, everyone sees everyone.

The windows of Longformer and the blocks of Big Bird are in files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.encoder_inputs import EncoderInputs
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear


class EncoderAttention(nn.Module, ABC):
    """Self-attention of a text's tokens (Vaswani et al. 2017, section 3.2.2).

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer_index: the layer's number, from 0.
        bias: whether queries, keys and values have biases; the map after them always has.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: heads do not divide dim.
    """

    supports_global_attention = False
    """Whether global tokens can be marked."""

    supports_random_blocks = False
    """Whether random blocks can be given."""

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
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor.")
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
        """The probability with which a weight is dropped now."""
        return self.dropout_rate if self.training else 0.0

    def split_heads(self, x: Tensor) -> Tensor:
        """(rows, n, dim) -> (rows, heads, n, head_dim)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return what each place attends to, (rows, length, dim).

        Args:
            x: (rows, length, dim).
            inputs: what is read.
        """
        out: Tensor = self.out(self.attend(x, inputs))
        return out

    def attention_scores(self, x: Tensor, queries: slice, keys: slice) -> Tensor:
        """Return (rows, heads, queries, keys) scaled products of some places of x, whoever sees whom."""
        q, k = self.split_heads(self.query(x[:, queries])), self.split_heads(self.key(x[:, keys]))
        out: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return out

    def within_window(self, distance: Tensor) -> Tensor | None:
        """Return whether places see each other by their distance alone, bool; None where it does not decide.

        Global tokens apart.

        Args:
            distance: int64, of any shape, the key's place less the query's.
        """
        return None

    @abstractmethod
    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), of x (rows, length, dim)."""


class FullAttention(EncoderAttention):
    """Every place sees every token (BERT, Devlin et al. 2019)."""

    def within_window(self, distance: Tensor) -> Tensor:
        """Return that they do."""
        return torch.ones_like(distance, dtype=torch.bool)

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), of x (rows, length, dim)."""
        q, k, v = (self.split_heads(part(x)) for part in (self.query, self.key, self.value))
        seen = full_visibility(inputs, inputs.length)
        return merge_heads(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend)[0])


def merge_heads(x: Tensor) -> Tensor:
    """(rows, heads, n, head_dim) -> (rows, n, dim)."""
    return x.transpose(1, 2).flatten(2)


def full_visibility(inputs: EncoderInputs, num_queries: int) -> Visibility:
    """Return the visibility of ``num_queries`` queries that see every token of the text."""

    def make() -> Visibility:
        born = torch.zeros(1, inputs.length, dtype=torch.int64, device=inputs.device)
        expires = born + num_queries
        if inputs.attention_mask is not None:
            expires = torch.where(inputs.attention_mask, expires, 0)
            born = born.expand_as(expires)
        return Visibility(born, expires, num_queries, (KeyRange(inputs.length),))

    return inputs.memo(("all", num_queries), make)
