"""Transformer-XL's relative attention: separate scores, and biases, for content and for distance.

Dai et al. 2019, section 3.3. The score of query i and key j is (q_i + u) k_j + (q_i + v) r_(i-j): terms a and c, b and
d of the paper. The second depends on query and distance together, so no fused kernel can add it as a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.ops.cpu.linear import Linear


def distance_embeddings(num_keys: int, dim: int, clamp_length: int, like: Tensor) -> Tensor:
    """Return the sinusoidal embeddings of the distances num_keys - 1, ..., 1, 0, as ``(num_keys, dim)``.

    Args:
        num_keys: Number of distances.
        dim: Width of the embeddings, even.
        clamp_length: Largest distance; longer ones are clamped to it. 0 or less disables the limit.
        like: Tensor whose device and dtype the result takes.
    """
    distance = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoidal_embedding(distance.clamp(max=clamp_length) if clamp_length > 0 else distance, dim, like)


def sinusoidal_embedding(distance: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return the embeddings of distances ``(n,)``, sines before cosines, ``(n, dim)`` in the dtype of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = 1 / 10000 ** (torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle = distance.to(dtype)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def relative_shift(scores: Tensor) -> Tensor:
    """Convert scores by distance to scores by key, both ``(..., queries, keys)``.

    Column p of the input is distance keys - 1 - p, and the last key is at the last query's position. Where a key would
    be after its query the result is meaningless.
    """
    queries, keys = scores.shape[-2:]
    # With one column more, each row is shifted by one against the previous row once the rows are cut again.
    flat = F.pad(scores, (1, 0)).flatten(-2)[..., queries:]
    return flat.view(*scores.shape[:-2], queries, keys)


class RelativeAttention(nn.Module):
    """Attention of a segment over [memory | segment].

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        head_dim: Width of a head.
        has_biases: If True, the layer has its own u and v; otherwise they are passed to each call.
        dropout: Dropout rate of the attention weights.
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
        """Attend to the memory and the segment; returns ``(batch, length, dim)``.

        Args:
            x: Layer inputs of the segment, ``(batch, length, dim)``.
            memory: Hidden states before the segment, ``(batch, memory_length, dim)``.
            sinusoids: Distance embeddings, farthest first, (memory_length + length, dim).
            mask: True for visible keys, ``(length, memory_length + length)`` bool.
            cross_document_mask: True for keys of another document than the query's, which count as zeros like an empty
                memory, ``(batch, length, memory_length + length)`` bool. None disables it.
            shared_biases: u and v of all layers, each ``(heads, head_dim)``, if the layer has none of its own.
        """
        length = x.shape[1]
        projected = self.query_key_value(torch.cat([memory, x], dim=1))
        projected = projected.view(*projected.shape[:2], 3, self.heads, self.head_dim).transpose(1, 3)
        q, k, v = projected.unbind(2)  # (batch, heads, memory_length + length, head_dim)
        q = q[:, :, -length:]
        u, v_bias = shared_biases if shared_biases is not None else (self.content_bias, self.position_bias)
        assert u is not None
        assert v_bias is not None
        r = self.distance(sinusoids).view(-1, self.heads, self.head_dim).transpose(0, 1)
        content_scores = (q + u[:, None]) @ k.transpose(-1, -2)
        if cross_document_mask is not None:
            content_scores = content_scores.masked_fill(cross_document_mask[:, None], 0.0)
        distance_scores = relative_shift((q + v_bias[:, None]) @ r.transpose(-1, -2))
        scores = (content_scores + distance_scores) * self.head_dim**-0.5
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores.to(dtype).masked_fill(~mask, float("-inf")), dim=-1)
        if cross_document_mask is not None:
            weights = weights.masked_fill(cross_document_mask[:, None], 0.0)
        attended = self.dropout(weights).to(v.dtype) @ v
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out
