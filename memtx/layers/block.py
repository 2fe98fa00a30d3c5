"""One layer: attention over its memories, then feed-forward, each normed first and added to the stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memtx.layers.attention import MemoryAttention
from memtx.memory.base import Losses
from memtx.memory.kv_ring import DecodeStep, KVRing
from memtx.segment import Segment


class Block(nn.Module):
    """A pre-norm layer (Xiong et al. 2020, figure 1b).

    Args:
        attention: the attention part.
        feed_forward: the position-wise part.
        attention_norm: before attention; what the memory carries are its outputs.
        feed_forward_norm: before the feed-forward part.
        dropout: of what each part adds to the residual stream.
    """

    def __init__(
        self,
        attention: MemoryAttention,
        feed_forward: nn.Module,
        attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Return the layer's output (rows, segment, dim), its memories' next states and losses."""
        attended, state, losses = self.attention(self.attention_norm(x), state, segment)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        if self.attention.needs_layer_output:
            state = self.attention.on_layer_output(state, self.attention_norm(x), segment)
        return x, state, losses

    def project_values(self, x: Tensor) -> Tensor:
        """Return the heads' values side by side, (rows, segment, heads * head_dim), of the layer's input x."""
        return self.attention.project(self.attention_norm(x), "value", frozen=False).flatten(2)

    def step(self, x: Tensor, ring: KVRing, step: DecodeStep) -> Tensor:
        """Return the layer's output (rows, dim) for one token a row; the ring is written in place."""
        x = x + self.attention.step(self.attention_norm(x), ring, step)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out
