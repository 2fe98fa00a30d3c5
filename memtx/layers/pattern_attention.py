"""Attention over a whole text, both ways: projections, and who sees whom as a pattern; here, everyone sees everyone.

The windows of Longformer and the blocks of Big Bird are in files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.reading import Reading
from memtx.ops.attention.dispatch import Backend, segment_attention
from memtx.ops.linear import Linear
from memtx.ops.visibility import Section, Visibility


class PatternAttention(nn.Module, ABC):
    """Self-attention of a text's tokens (Vaswani et al. 2017, section 3.2.2).

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer: the layer's number, from 0.
        bias: whether queries, keys and values have biases; the map after them always has.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: heads do not divide dim.
    """

    knows_globals = False
    """Whether global tokens can be marked."""

    knows_random_blocks = False
    """Whether random blocks can be given."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor.")
        self.heads = heads
        self.layer = layer
        self.rate = dropout
        self.backend: Backend = backend
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, dim, bias=bias)
        self.value = Linear(dim, dim, bias=bias)
        self.out = Linear(dim, dim)

    @property
    def dropout(self) -> float:
        """The probability with which a weight is dropped now."""
        return self.rate if self.training else 0.0

    def in_heads(self, x: Tensor) -> Tensor:
        """(rows, n, dim) -> (rows, heads, n, head_dim)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, reading: Reading) -> Tensor:
        """Return what each place attends to, (rows, length, dim).

        Args:
            x: (rows, length, dim).
            reading: what is read.
        """
        out: Tensor = self.out(self.attend(x, reading))
        return out

    def scores(self, x: Tensor, queries: slice, keys: slice) -> Tensor:
        """Return (rows, heads, queries, keys) scaled products of some places of x, whoever sees whom."""
        q, k = self.in_heads(self.query(x[:, queries])), self.in_heads(self.key(x[:, keys]))
        out: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return out

    def near(self, distance: Tensor) -> Tensor | None:
        """Return whether places see each other by their distance alone, bool; None where it does not decide.

        Global tokens apart.

        Args:
            distance: int64, of any shape, the key's place less the query's.
        """
        return None

    @abstractmethod
    def attend(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), of x (rows, length, dim)."""


class FullAttention(PatternAttention):
    """Every place sees every token (BERT, Devlin et al. 2019)."""

    def near(self, distance: Tensor) -> Tensor:
        """Return that they do."""
        return torch.ones_like(distance, dtype=torch.bool)

    def attend(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), of x (rows, length, dim)."""
        q, k, v = (self.in_heads(part(x)) for part in (self.query, self.key, self.value))
        seen = seen_by_all(reading, reading.length)
        return side_by_side(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend))


def side_by_side(x: Tensor) -> Tensor:
    """(rows, heads, n, head_dim) -> (rows, n, dim)."""
    return x.transpose(1, 2).flatten(2)


def seen_by_all(reading: Reading, queries: int) -> Visibility:
    """Return the visibility of ``queries`` queries that see every token of the text."""

    def make() -> Visibility:
        born = torch.zeros(1, reading.length, dtype=torch.int64, device=reading.device)
        expires = born + queries
        if reading.present is not None:
            expires = torch.where(reading.present, expires, 0)
            born = born.expand_as(expires)
        return Visibility(born, expires, queries, (Section(reading.length),))

    return reading.once(("all", queries), make)
