"""Attention within chunks of tokens, in text order or sorted by a hash (Reformer).

Kitaev, Kaiser and Levskaya 2020, section 2. Chunks are cyclic: the last chunk precedes the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_VALUE = -1e9
"""Score of a masked key: finite, so that a fully masked query averages all keys."""

SELF_MASK_VALUE = -1e5
"""Score of a query's own position if queries are also keys: attended to only if nothing else is (section 2)."""


def choose_bucket_factors(length: int, chunk_length: int, max_length: int) -> tuple[int, ...]:
    """Choose the number of hash buckets for a text, as one number or two factors.

    About two buckets per chunk, as in the paper, rounded down to a power of two. ``max_length`` is the model's.
    """
    exponent = (2 * (length // chunk_length)).bit_length() - 1
    if 2**exponent > 2 * max(int((max_length // chunk_length) ** 0.5), chunk_length):
        return 2 ** (exponent // 2), 2 ** (exponent - exponent // 2)
    return (2**exponent,)


def sample_rotations(
    heads: int, head_dim: int, num_hashes: int, factors: Sequence[int], seed: int | None, like: Tensor
) -> Tensor:
    """Sample normal random directions for hashing, ``(heads, head_dim, num_hashes, sum(factors) // 2)``.

    A seed samples on the CPU; None uses torch's global generator. ``like`` sets device and dtype.
    """
    shape = (heads, head_dim, num_hashes, sum(factors) // 2)
    if seed is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    rotations = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return rotations.to(like.device)


def hash_vectors(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """Hash vectors to buckets, ``(batch, heads, num_hashes, n)`` int64 (section 2, locality sensitive hashing).

    ``x`` is ``(batch, heads, n, head_dim)``, ``rotations`` are those of :func:`sample_rotations`, and ``factors`` are
    the factors of the number of buckets, least significant first.
    """
    rotated = torch.einsum("bhnw,hwrf->bhrnf", x, rotations)
    bucket = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=x.device)
    start, multiplier = 0, 1
    for factor in factors:
        projected = rotated[..., start : start + factor // 2]
        bucket = bucket + multiplier * torch.cat([projected, -projected], dim=-1).argmax(-1)
        start, multiplier = start + factor // 2, multiplier * factor
    return bucket


def look_adjacent(x: Tensor, num_chunks_before: int, num_chunks_after: int) -> Tensor:
    """Concatenate each chunk of ``(batch, heads, chunks, chunk_length, ...)`` with its neighbors, in order.

    The result has chunks of length ``(num_chunks_before + 1 + num_chunks_after) * chunk_length``.
    """
    if num_chunks_before == num_chunks_after == 0:
        return x
    chunks = x.shape[2]
    # A neighbor farther away than the number of chunks is the chunk itself, as in training of the published models.
    shifts = range(-num_chunks_before, num_chunks_after + 1)
    return torch.cat([x.roll(-shift, dims=2) if abs(shift) < chunks else x for shift in shifts], dim=3)


def attend_chunks(
    q: Tensor, k: Tensor, v: Tensor, query_position: Tensor, key_position: Tensor, attention_mask: Tensor | None,
    *, causal: bool, mask_self: bool, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend within chunks; return ``(batch, heads, chunks, queries, head_dim)`` and the log-sum-exp without head_dim.

    Args:
        q: ``(batch, heads, chunks, queries, head_dim)``.
        k: ``(batch, heads, chunks, keys, head_dim)``, scaled.
        v: ``(batch, heads, chunks, keys, head_dim)``.
        query_position: ``(batch, heads, chunks, queries)`` int64, positions in the text; batch and heads may be 1.
        key_position: ``(batch, heads, chunks, keys)`` int64.
        attention_mask: Bool of key_position's shape, False for padding. None if there is no padding.
        causal: If True, mask keys after the query.
        mask_self: If True, a query attends to its own position only if nothing else is visible.
        dropout: Dropout rate of the attention weights.
    """
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    visible = None if attention_mask is None else attention_mask[..., None, :]
    if causal:
        past = query_position[..., :, None] >= key_position[..., None, :]
        visible = past if visible is None else visible & past
    if visible is not None:
        scores = scores.masked_fill(~visible, MASK_VALUE)
    if mask_self:
        scores = scores.masked_fill(query_position[..., :, None] == key_position[..., None, :], SELF_MASK_VALUE)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return F.dropout(weights, dropout).to(v.dtype) @ v, lse
