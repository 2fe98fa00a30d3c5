"""Attention within chunks, of neighbours in the text or of neighbours after sorting by a hash (Reformer).

Kitaev, Kaiser and Levskaya 2020, section 2. Chunks are cyclic: before the first one stands the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_VALUE = -1e9
"""The score of a key that is not seen: finite, so that a query that sees nothing takes the mean of all."""

SELF_MASK_VALUE = -1e5
"""The score of a query's own place where queries are keys: seen if nothing else is (section 2, causal masking)."""


def choose_bucket_factors(length: int, chunk_length: int, max_length: int) -> tuple[int, ...]:
    """Return how many buckets suit a text, as one number or as two factors of it.

    About two for each chunk, as the article has it, rounded down to a power of two.

    Args:
        length: places of the text.
        chunk_length: places of a chunk.
        max_length: places of the longest text that the model is for.
    """
    power = (2 * (length // chunk_length)).bit_length() - 1
    if 2**power > 2 * max(int((max_length // chunk_length) ** 0.5), chunk_length):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return (2**power,)


def sample_rotations(
    heads: int, head_dim: int, num_hashes: int, factors: Sequence[int], seed: int | None, like: Tensor
) -> Tensor:
    """Return random directions to hash by, (heads, head_dim, num_hashes, half of the factors' sum), normal.

    Args:
        heads: how many.
        head_dim: of a head.
        num_hashes: of hashing.
        factors: of the number of buckets.
        seed: of the numbers, drawn on the CPU; None for those of torch's own generator.
        like: gives device and dtype.
    """
    shape = (heads, head_dim, num_hashes, sum(factors) // 2)
    if seed is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return drawn.to(like.device)


def hash_vectors(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """Return the bucket of each vector, (rows, heads, num_hashes, n) int64 (section 2, locality sensitive hashing).

    Args:
        x: (rows, heads, n, width).
        rotations: of :func:`sample_rotations`.
        factors: of the number of buckets; the first counts ones, the next what the first makes, and so on.
    """
    turned = torch.einsum("bhnw,hwrf->bhrnf", x, rotations)
    bucket = torch.zeros(turned.shape[:-1], dtype=torch.int64, device=x.device)
    used, worth = 0, 1
    for factor in factors:
        part = turned[..., used : used + factor // 2]
        bucket = bucket + worth * torch.cat([part, -part], dim=-1).argmax(-1)
        used, worth = used + factor // 2, worth * factor
    return bucket


def look_adjacent(x: Tensor, num_chunks_before: int, num_chunks_after: int) -> Tensor:
    """Return for each chunk itself and its neighbours, in order.

    Args:
        x: (rows, heads, chunks, places, ...).
        num_chunks_before: neighbours before it.
        num_chunks_after: neighbours after it.

    Returns:
        (rows, heads, chunks, (num_chunks_before + 1 + num_chunks_after) * places, ...).
    """
    if num_chunks_before == num_chunks_after == 0:
        return x
    chunks = x.shape[2]
    # A neighbour farther away than there are chunks is the chunk itself: so the published models were trained.
    turned = [x.roll(-i, dims=2) if abs(i) < chunks else x for i in range(-num_chunks_before, num_chunks_after + 1)]
    return torch.cat(turned, dim=3)


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    attention_mask: Tensor | None,
    *,
    causal: bool,
    mask_self: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return each chunk's attention (rows, heads, chunks, c, width) and its log-sum-exp (rows, heads, chunks, c).

    Args:
        q: (rows, heads, chunks, c, width).
        k: (rows, heads, chunks, e, width), scaled.
        v: (rows, heads, chunks, e, width).
        query_position: (rows, heads, chunks, c) int64, where queries stand in the text; rows and heads may be 1.
        key_position: (rows, heads, chunks, e) int64, where keys stand.
        attention_mask: as key_position, bool, False for padding; None for none.
        causal: whether keys behind the query are unseen.
        mask_self: whether the query's own place is seen only if nothing else is.
        dropout: probability with which a weight is dropped.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2)).to(kind)
    seen = None if attention_mask is None else attention_mask[..., None, :]
    if causal:
        past = query_position[..., :, None] >= key_position[..., None, :]
        seen = past if seen is None else seen & past
    if seen is not None:
        scores = scores.masked_fill(~seen, MASK_VALUE)
    if mask_self:
        scores = scores.masked_fill(query_position[..., :, None] == key_position[..., None, :], SELF_MASK_VALUE)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return F.dropout(weights, dropout).to(v.dtype) @ v, lse
