"""Decoder layers that attend to their own past and to an encoder's output (Vaswani et al. 2017, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_divisible
from memtx.layers.feed_forward import FeedForward
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.cpu.linear import Linear


class KeyValue(NamedTuple):
    """Keys and values of a sequence, ``(batch, heads, length, head_dim)`` each."""

    key: Tensor
    value: Tensor


class CrossAttention(nn.Module):
    """Attention from one sequence to another, or to itself.

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        bias: If True, the projections have biases.
        dropout: Dropout rate of the attention weights.

    Raises:
        MemtxError: dim is not divisible by heads.
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        check_divisible(dim=dim, heads=heads)
        self.heads, self.dropout = heads, dropout
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, dim, bias=bias)
        self.value = Linear(dim, dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)

    def project(self, source: Tensor) -> KeyValue:
        """Return the keys and values of source ``(batch, length, dim)``."""
        return KeyValue(split_heads(self.key(source), self.heads), split_heads(self.value(source), self.heads))

    def forward(self, x: Tensor, source: KeyValue, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from x ``(rows, length, dim)`` to the source; returns the same shape.

        Args:
            x: Inputs. There may be several rows per row of the source, which then follow each other.
            source: Keys and values.
            mask: ``(batch, 1, 1 or length, source length)`` bool, False where a position does not see another, such as
                padding; one that sees none gets zeros. None if all are seen.
            is_causal: If True, each position sees the source's positions up to its own; there is no mask then.
        """
        q = split_heads(self.query(x).view(source.key.shape[0], -1, x.shape[-1]), self.heads)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, *source, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        return self.out(merge_heads(out).view_as(x))


class DecoderBlock(nn.Module):
    """A decoder layer of causal self-attention, cross attention and a feed-forward part.

    Args:
        dim: Width of the hidden states.
        heads: Heads of both attentions.
        hidden_dim: Hidden width of the feed-forward part. Defaults to 4 dim.
        activation: Factory of its activation.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the residual branches.
        attention_dropout: Dropout rate of the attention weights.
        attention_bias: If True, the projections of both attentions have biases.
        pre_norm: If True, normalize before each part instead of after it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden_dim: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention_bias: bool = True,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = CrossAttention(dim, heads, bias=attention_bias, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.cross_attention = CrossAttention(dim, heads, bias=attention_bias, dropout=attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, hidden_dim, activation=activation)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, past: KeyValue | None, source: KeyValue, source_mask: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Return the layer's output for x, both ``(rows, length, dim)``, and the keys and values of all positions.

        Several positions at once have no past. ``mask`` replaces the causal one, True where a position sees another,
        ``(rows, 1, length, length)`` bool.
        """
        inputs = self._before(self.attention_norm, x)
        seen = self.attention.project(inputs)
        if past is not None:
            seen = KeyValue(*(torch.cat(parts, dim=2) for parts in zip(past, seen, strict=True)))
        x = self._after(
            self.attention_norm, x, self.attention(inputs, seen, mask=mask, is_causal=past is None and mask is None)
        )
        inputs = self._before(self.cross_attention_norm, x)
        x = self._after(self.cross_attention_norm, x, self.cross_attention(inputs, source, mask=source_mask))
        hidden = self.feed_forward(self._before(self.feed_forward_norm, x))
        return self._after(self.feed_forward_norm, x, hidden), seen

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return the input of a part."""
        out: Tensor = norm(x) if self.pre_norm else x
        return out

    def _after(self, norm: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return x with the output of a part."""
        x = x + self.dropout(output)
        out: Tensor = x if self.pre_norm else norm(x)
        return out
