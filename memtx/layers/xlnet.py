"""Two streams of attention: what a place holds, and what can be guessed of it without seeing it.

XLNet, Yang et al. 2019, section 2.3. A text is read in some order. The content stream of a place sees the places read
up to it, itself among them; the query stream sees those read before it, and knows where it stands but not what is
there. Both have the same weights. Distances apart are scored as in Transformer-XL (Dai et al. 2019, section 3.3), to
both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.layers.feed_forward import FeedForward
from memtx.layers.transformer_xl import sinusoidal_embedding
from memtx.ops.cpu.linear import Linear


def bidirectional_relative_shift(scores: Tensor) -> Tensor:
    """Return scores by key (..., n, n) of scores by distance (..., n, 2 n - 1): column p is distance n - 1 - p."""
    n = scores.shape[-2]
    # Row i begins n - 1 - i columns in: in one line, one step less than a row's length from one to the next.
    flat = scores.flatten(-2)[..., n - 1 : n - 1 + n * (2 * n - 2)]
    return flat.reshape(*scores.shape[:-1], 2 * n - 2)[..., :n] if n > 1 else scores


class TwoStreamAttention(nn.Module):
    """Attention that serves both streams.

    Args:
        dim: width of the hidden states.
        heads: how many.
        dropout: of attention weights.
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
        """Return what is seen, (rows, n, dim); zero where a place sees nothing.

        Args:
            queries: (rows, n, dim), the stream that asks.
            content: (rows, n, dim), what is seen.
            sinusoids: (2 n - 1, dim), sinusoids of n - 1, ..., 0, ..., 1 - n.
            mask: (rows or 1, n, n) bool, by asking place and place asked.
        """
        q = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (rows, heads, n, head_dim)
        k, v = self.key_value(content).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        r = self.distance(sinusoids).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, 2 n - 1, head_dim)
        near = (q + self.content_bias[:, None]) @ k.transpose(-1, -2)
        far = bidirectional_relative_shift((q + self.position_bias[:, None]) @ r.transpose(-1, -2))
        scores = (near + far) * self.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min), dim=-1)
        # Who sees nothing would see all alike.
        weights = self.dropout(weights.masked_fill(~mask[:, None], 0.0))
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class TwoStreamBlock(nn.Module):
    """A post-norm layer for both streams.

    Args:
        dim: width of the hidden states.
        heads: how many.
        hidden_dim: inner width of the feed-forward part; 4 dim by default.
        eps: of the norms.
        dropout: of what each part adds.
    """

    def __init__(self, dim: int, heads: int, hidden_dim: int | None, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = TwoStreamAttention(dim, heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = FeedForward(dim, hidden_dim, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, content: Tensor, sinusoids: Tensor, mask: Tensor) -> Tensor:
        """Return the next layer's stream of those who ask, (rows, n, dim); arguments as in the attention."""
        x = self.attention_norm(queries + self.dropout(self.attention(queries, content, sinusoids, mask)))
        out: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out


def bidirectional_sinusoids(length: int, like: Tensor) -> Tensor:
    """Return the sinusoids of the distances n - 1, ..., 0, ..., 1 - n: (2 n - 1, width) for like (..., width)."""
    distance = torch.arange(length - 1, -length, -1, device=like.device)
    return sinusoidal_embedding(distance, like.shape[-1], like)
