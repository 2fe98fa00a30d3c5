"""XLNet's two-stream attention: a content stream, and a query stream that predicts tokens without seeing them.

Yang et al. 2019, section 2.3. Both streams share all weights and attend to the content, memory included. Distances are
scored as in Transformer-XL (Dai et al. 2019, section 3.3), in both directions, and pairs of tokens by whether they are
of the same segment of text (section 2.5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtx.layers.feed_forward import FeedForward
from memtx.layers.positions.relative import sinusoidal_embedding
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.attention.scores import shift_rows
from memtx.ops.cpu.linear import Linear


@dataclass(frozen=True)
class StreamInputs:
    """Inputs that all layers of a stream share, for q queries and k keys: memory, then the n tokens of the call.

    Attributes:
        sinusoids: Embeddings of the distances k, ..., 1 - n, ``(1 or batch, k + n, dim)``.
        hidden: True where a query does not see a key, ``(1 or batch, q, k)`` bool; None for full attention. As in the
            original code, a query that sees no key takes the mean of all.
        absent: True for a key that does not exist for a query, which no mean includes, ``(batch, 1 or q, k)`` bool.
        is_other_segment: True where query and key are of two segments of text, ``(batch, q, k)`` bool; None if
            segments are not scored.
        positions: Position in the call of each query, ``(batch, q)`` int64; None for all, in order.
    """

    sinusoids: Tensor
    hidden: Tensor | None = None
    absent: Tensor | None = None
    is_other_segment: Tensor | None = None
    positions: Tensor | None = None

    def at(self, positions: Tensor, hidden: Tensor | None) -> StreamInputs:
        """Return the inputs of a stream with queries at ``positions`` alone; ``hidden`` replaces that of all."""

        def select(mask: Tensor | None) -> Tensor | None:
            if mask is None or mask.shape[1] == 1:
                return mask
            mask = mask.expand(len(positions), -1, -1)
            return mask.gather(1, positions[..., None].expand(-1, -1, mask.shape[2]))

        is_other = select(self.is_other_segment)
        return StreamInputs(self.sinusoids, select(hidden), select(self.absent), is_other, positions)


def relative_sinusoids(num_keys: int, length: int, like: Tensor, clamp_length: int = -1) -> Tensor:
    """Return the embeddings of the distances num_keys, ..., 1 - length, ``(num_keys + length, dim)``.

    Distances beyond ``clamp_length`` are clamped to it, in both directions; 0 or less disables the limit.
    """
    distance = torch.arange(num_keys, -length, -1, device=like.device)
    if clamp_length > 0:
        distance = distance.clamp(-clamp_length, clamp_length)
    return sinusoidal_embedding(distance, like.shape[-1], like)


def bidirectional_relative_shift(scores: Tensor, num_keys: int, positions: Tensor | None = None) -> Tensor:
    """Convert scores by distance ``(batch, heads, q, k + n)`` to scores by key, ``(batch, heads, q, k)``.

    Column p is the distance k - p. The queries are at ``positions`` of the last n keys, ``(batch, q)``; None for q = n
    queries in order.
    """
    n = scores.shape[-1] - num_keys
    if positions is not None:
        columns = n - positions[..., None] + torch.arange(num_keys, device=scores.device)
        return scores.gather(-1, columns[:, None].expand(-1, scores.shape[1], -1, -1))
    return shift_rows(scores, n, num_keys)


class TwoStreamAttention(nn.Module):
    """Attention shared by both streams.

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        dropout: Dropout rate of the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query = Linear(dim, dim, bias=False)
        self.key_value = Linear(dim, 2 * dim, bias=False)
        self.distance = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.segment_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.segment_embedding = nn.Parameter(torch.zeros(2, heads, self.head_dim))  # same segment, another one
        self.dropout = nn.Dropout(dropout)

    def project(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(batch, heads, k, head_dim)`` of memory and content ``(batch, k, dim)``."""
        k, v = (split_heads(part, self.heads) for part in self.key_value(content).chunk(2, dim=-1))
        return k, v

    def forward(self, queries: Tensor, keys_values: tuple[Tensor, Tensor], inputs: StreamInputs) -> Tensor:
        """Attend from one stream, ``(batch, q, dim)``, to the content; returns the same shape."""
        q = split_heads(self.query(queries), self.heads)  # (batch, heads, q, head_dim)
        k, v = keys_values
        r = split_heads(self.distance(inputs.sinusoids), self.heads)  # (1 or batch, heads, k + n, head_dim)
        scores = (q + self.content_bias[:, None]) @ k.transpose(-1, -2)
        by_distance = (q + self.position_bias[:, None]) @ r.transpose(-1, -2)
        scores = scores + bidirectional_relative_shift(by_distance, k.shape[2], inputs.positions)
        if inputs.is_other_segment is not None:
            by_segment = (q + self.segment_bias[:, None]) @ self.segment_embedding.permute(1, 2, 0)
            same, other = by_segment.unbind(-1)
            scores = scores + torch.where(inputs.is_other_segment[:, None], other[..., None], same[..., None])
        scores = (scores * self.head_dim**-0.5).to(torch.promote_types(scores.dtype, torch.float32))
        if inputs.hidden is not None:
            scores = scores.masked_fill(inputs.hidden[:, None], torch.finfo(scores.dtype).min)
        if inputs.absent is not None:
            scores = scores.masked_fill(inputs.absent[:, None], float("-inf"))
        weights = self.dropout(torch.softmax(scores, dim=-1)).to(v.dtype)
        return self.out(merge_heads(weights @ v))


class TwoStreamBlock(nn.Module):
    """A post-norm layer for both streams.

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        hidden_dim: Inner width of the feed-forward part. None gives 4 * dim.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the residual branches.
        activation: Factory of the feed-forward activation.
    """

    def __init__(
        self, dim: int, heads: int, hidden_dim: int | None, eps: float, dropout: float,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = TwoStreamAttention(dim, heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, hidden_dim, dropout, activation=activation)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys_values: tuple[Tensor, Tensor], inputs: StreamInputs) -> Tensor:
        """Return the next layer's input of the querying stream, ``(batch, q, dim)``; arguments as in the attention."""
        x = self.attention_norm(queries + self.dropout(self.attention(queries, keys_values, inputs)))
        out: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out
