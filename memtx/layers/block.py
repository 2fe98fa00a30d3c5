"""Layers: attention and a feed-forward part, each with a norm and a residual connection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memtx.layers.attention import MemoryAttention
from memtx.layers.encoder_attention import EncoderAttention, EncoderInputs
from memtx.layers.token_mixer import TokenMixer
from memtx.memory.base import Losses
from memtx.memory.kv_ring import DecodeStep
from memtx.ops.cpu.token_chunks import split_without_grad
from memtx.segment import Segment


class Block(nn.Module):
    """A decoder layer with norms before its parts (Xiong et al. 2020, figure 1b), after them, or of the residual sums.

    Args:
        attention: Attention part, or the memory in its place.
        feed_forward: Position-wise part.
        attention_norm: Norm before attention; the memories carry its outputs.
        feed_forward_norm: Norm before the feed-forward part.
        dropout: Dropout rate of the residual branches.
        attention_post_norm: Norm of the attention's output, before it is added. None disables it.
        feed_forward_post_norm: Norm of the feed-forward part's output. None disables it.
        attention_residual_norm: Norm of the sum of the layer's input and the attention's output. None disables it.
        feed_forward_residual_norm: Norm of the sum after the feed-forward part. None disables it.
    """

    def __init__(
        self,
        attention: MemoryAttention | TokenMixer,
        feed_forward: nn.Module,
        attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
        dropout: float = 0.0,
        attention_post_norm: nn.Module | None = None,
        feed_forward_post_norm: nn.Module | None = None,
        attention_residual_norm: nn.Module | None = None,
        feed_forward_residual_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention_residual_norm = attention_residual_norm or nn.Identity()
        self.feed_forward_residual_norm = feed_forward_residual_norm or nn.Identity()
        self.attention_post_norm = attention_post_norm if attention_post_norm is not None else nn.Identity()
        self.feed_forward_post_norm = feed_forward_post_norm if feed_forward_post_norm is not None else nn.Identity()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    @property
    def is_normalized(self) -> bool:
        """True if the layer's output is normalized."""
        return not isinstance(self.feed_forward_residual_norm, nn.Identity)

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Return the layer's output ``(batch, length, dim)``, and its memories' next states and losses."""
        if isinstance(self.attention, MemoryAttention) and self.attention.memory.changes_layer_input:
            x = self.attention.memory.on_layer_input(state[0], x)
        attended, state, losses = self.attention(self.attention_norm(x), state, segment)
        x = self.attention_residual_norm(x + self.dropout(self.attention_post_norm(attended)))
        chunks = split_without_grad(x)
        for chunk in chunks if len(chunks) > 1 else ():
            chunk += self._feed_forward(chunk)  # a view of x
        x = self.feed_forward_residual_norm(x if len(chunks) > 1 else x + self._feed_forward(x))
        if isinstance(self.attention, MemoryAttention) and self.attention.needs_layer_output:
            state = self.attention.on_layer_output(state, self.attention_norm(x), segment)
        return x, state, losses

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(x))))
        return out

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of the layer's input x, all heads concatenated, ``(batch, length, heads * head_dim)``."""
        return self.attention.project_values(self.attention_norm(x))

    def step(self, x: Tensor, ring: Any, step: DecodeStep) -> Tensor:
        """Return the layer's output ``(batch, dim)`` for one token per stream; the buffers are written in place."""
        attended = self.attention_post_norm(self.attention.step(self.attention_norm(x), ring, step))
        x = self.attention_residual_norm(x + attended)
        out: Tensor = x + self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(x)))
        out = self.feed_forward_residual_norm(out)
        return out


def run_recomputed(
    block: Block, x: Tensor, state: tuple[Any, ...], segment: Segment
) -> tuple[Tensor, tuple[Any, ...], Losses]:
    """Return ``block(x, state, segment)``; compiled, with a cache of its own, since it may not write the segment's."""
    segment = replace(segment, _values={}) if torch.compiler.is_compiling() else segment
    out: tuple[Tensor, tuple[Any, ...], Losses] = block(x, state, segment)
    return out


class EncoderBlock(nn.Module):
    """An encoder layer with norms after its parts (Vaswani et al. 2017, section 3.1) or before them.

    Args:
        attention: Attention part.
        feed_forward: Position-wise part.
        dim: Width of the hidden states.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the residual branches.
        pre_norm: If True, normalize before each part instead of after it.
    """

    def __init__(
        self,
        attention: EncoderAttention,
        feed_forward: nn.Module,
        dim: int,
        eps: float,
        dropout: float,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the layer's output ``(batch, length, dim)``."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), inputs))
            hidden: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
            return x + hidden
        x = self.attention_norm(x + self.dropout(self.attention(x, inputs)))
        out: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of the layer's input x, all heads concatenated, ``(batch, length, dim)``."""
        out: Tensor = self.attention.value(self.attention_norm(x) if self.pre_norm else x)
        return out
