"""XLNet's two-stream attention: a content stream, and a query stream that predicts each token without seeing it.

Yang et al. 2019, section 2.3. A text is read in some order. The content stream of a token sees all tokens up to it in
that order, itself included; the query stream sees those before it, and knows its position but not its content. Both
share all weights. Distances are scored as in Transformer-XL (Dai et al. 2019, section 3.3), in both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.layers.feed_forward import FeedForward
from memtx.layers.positions.relative import sinusoidal_embedding
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.cpu.linear import Linear


def bidirectional_relative_shift(scores: Tensor) -> Tensor:
    """Convert scores by distance ``(..., n, 2n - 1)``, whose column p is distance n - 1 - p, to scores by key."""
    n = scores.shape[-2]
    # Row i starts at column n - 1 - i: in the flattened scores, rows start one less than a row's length apart.
    flat = scores.flatten(-2)[..., n - 1 : n - 1 + n * (2 * n - 2)]
    return flat.reshape(*scores.shape[:-1], 2 * n - 2)[..., :n] if n > 1 else scores


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
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, content: Tensor, sinusoids: Tensor, mask: Tensor) -> Tensor:
        """Attend from one stream to the content.

        Args:
            queries: Either stream, ``(batch, n, dim)``.
            content: Content stream, ``(batch, n, dim)``.
            sinusoids: Embeddings of the distances n - 1, ..., 0, ..., 1 - n, (2n - 1, dim).
            mask: True where a query (second dimension) sees a key (third), ``(batch or 1, n, n)`` bool.

        Returns:
            ``(batch, n, dim)``; zero before the output projection where a query sees nothing.
        """
        q = split_heads(self.query(queries), self.heads)  # (batch, heads, n, head_dim)
        k, v = (split_heads(part, self.heads) for part in self.key_value(content).chunk(2, dim=-1))
        r = split_heads(self.distance(sinusoids), self.heads)  # (heads, 2n - 1, head_dim)
        content_scores = (q + self.content_bias[:, None]) @ k.transpose(-1, -2)
        distance_scores = bidirectional_relative_shift((q + self.position_bias[:, None]) @ r.transpose(-1, -2))
        scores = (content_scores + distance_scores) * self.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min), dim=-1)
        # A query without visible keys would see all of them equally.
        weights = self.dropout(weights.masked_fill(~mask[:, None], 0.0))
        return self.out(merge_heads(weights @ v))


class TwoStreamBlock(nn.Module):
    """A post-norm layer for both streams.

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        hidden_dim: Inner width of the feed-forward part. None gives 4 * dim.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the residual branches.
    """

    def __init__(self, dim: int, heads: int, hidden_dim: int | None, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = TwoStreamAttention(dim, heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, hidden_dim, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, content: Tensor, sinusoids: Tensor, mask: Tensor) -> Tensor:
        """Return the next layer's input of the querying stream, ``(batch, n, dim)``; arguments as in the attention."""
        x = self.attention_norm(queries + self.dropout(self.attention(queries, content, sinusoids, mask)))
        out: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out


def bidirectional_sinusoids(length: int, like: Tensor) -> Tensor:
    """Return the embeddings of the distances length - 1, ..., 1 - length, ``(2 * length - 1, dim)``."""
    distance = torch.arange(length - 1, -length, -1, device=like.device)
    return sinusoidal_embedding(distance, like.shape[-1], like)
