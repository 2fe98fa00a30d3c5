"""Transformer-XL's attention: queries meet content and distance apart, each with a bias of its own.

Dai et al. 2019, section 3.3. The score of query i and key j is (q_i + u) k_j + (q_i + v) r_(i-j): terms a and c, b and
d of the article. The second depends on query and distance together, so it is no bias that a fused kernel could add.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.ops.cpu.linear import Linear


def distance_embeddings(num_keys: int, dim: int, clamp_length: int, like: Tensor) -> Tensor:
    """Return the sinusoids of the distances num_keys - 1, ..., 1, 0, (num_keys, dim), sines before cosines.

    Args:
        num_keys: how many.
        dim: even.
        clamp_length: farther distances count as this one; 0 or less for no such limit.
        like: gives device and dtype; angles are computed in float32 at least.
    """
    distance = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoidal_embedding(distance.clamp(max=clamp_length) if clamp_length > 0 else distance, dim, like)


def sinusoidal_embedding(distance: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return the code of distances (n,), (n, dim), in the type of ``like``: sines before cosines."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    frequency = 1 / 10000 ** (torch.arange(0, dim, 2, device=like.device, dtype=kind) / dim)
    angle = distance.to(kind)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """Return scores by key (..., queries, keys) of scores by distance.

    Column p of the input is distance keys - 1 - p; the last key stands where the last query does. Where a key would
    stand behind its query the result means nothing.
    """
    queries, keys = scores.shape[-2:]
    # A column more shifts each line by one place against the one before it, once lines are cut anew.
    flat = F.pad(scores, (1, 0)).flatten(-2)[..., queries:]
    return flat.view(*scores.shape[:-2], queries, keys)


class RelativeAttention(nn.Module):
    """Attention of a segment over [memory | segment].

    Args:
        dim: width of the hidden states.
        heads: how many.
        head_dim: width of a head.
        has_biases: whether u and v are the layer's own; else they are given with each call.
        dropout: of attention weights.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, has_biases: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.query_key_value = Linear(dim, 3 * heads * head_dim, bias=False)
        self.distance = Linear(dim, heads * head_dim, bias=False)
        self.out = Linear(heads * head_dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, head_dim)) if has_biases else None
        self.position_bias = nn.Parameter(torch.zeros(heads, head_dim)) if has_biases else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        sinusoids: Tensor,
        mask: Tensor,
        cross_document_mask: Tensor | None,
        shared_biases: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return (rows, segment, dim).

        Args:
            x: (rows, segment, dim).
            memory: (rows, places, dim), hidden states before the segment.
            sinusoids: (places + segment, dim), by descending distance.
            mask: (segment, places + segment) bool.
            cross_document_mask: (rows, segment, places + segment) bool, keys of another document than the query's,
                which count as the zeros of an empty memory do; None for none.
            shared_biases: u and v of all layers, each (heads, head_dim), where the layer has none of its own.
        """
        segment = x.shape[1]
        projected = self.query_key_value(torch.cat([memory, x], dim=1))
        projected = projected.view(*projected.shape[:2], 3, self.heads, self.head_dim).transpose(1, 3)
        q, k, v = projected.unbind(2)  # (rows, heads, places + segment, head_dim)
        q = q[:, :, -segment:]
        content, position = shared_biases if shared_biases is not None else (self.content_bias, self.position_bias)
        assert content is not None
        assert position is not None
        r = self.distance(sinusoids).view(-1, self.heads, self.head_dim).transpose(0, 1)
        by_content = (q + content[:, None]) @ k.transpose(-1, -2)
        if cross_document_mask is not None:
            by_content = by_content.masked_fill(cross_document_mask[:, None], 0.0)
        scores = (by_content + relative_shift((q + position[:, None]) @ r.transpose(-1, -2))) * self.head_dim**-0.5
        kind = torch.float64 if scores.dtype == torch.float64 else torch.float32
        weights = torch.softmax(scores.to(kind).masked_fill(~mask, float("-inf")), dim=-1)
        if cross_document_mask is not None:
            weights = weights.masked_fill(cross_document_mask[:, None], 0.0)
        attended = self.dropout(weights).to(v.dtype) @ v
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out
