"""Attention within chunks, of neighbours in the text or of neighbours after sorting by a hash (Reformer).

Kitaev, Kaiser and Levskaya 2020, section 2. Chunks are cyclic: before the first one stands the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

UNSEEN = -1e9
"""The score of a key that is not seen: finite, so that a query that sees nothing takes the mean of all."""

OWN = -1e5
"""The score of a query's own place where queries are keys: seen if nothing else is (section 2, causal masking)."""


def bucket_factors(length: int, chunk: int, longest: int) -> tuple[int, ...]:
    """Return how many buckets suit a text, as one number or as two factors of it.

    About two for each chunk, as the article has it, rounded down to a power of two.

    Args:
        length: places of the text.
        chunk: places of a chunk.
        longest: places of the longest text that the model is for.
    """
    power = (2 * (length // chunk)).bit_length() - 1
    if 2**power > 2 * max(int((longest // chunk) ** 0.5), chunk):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return (2**power,)


def rotations(heads: int, width: int, rounds: int, factors: Sequence[int], seed: int | None, like: Tensor) -> Tensor:
    """Return random directions to hash by, (heads, width, rounds, half of the factors' sum), normal.

    Args:
        heads: how many.
        width: of a head.
        rounds: of hashing.
        factors: of the number of buckets.
        seed: of the numbers, drawn on the CPU; None for those of torch's own generator.
        like: gives device and dtype.
    """
    shape = (heads, width, rounds, sum(factors) // 2)
    if seed is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return drawn.to(like.device)


def hashed(x: Tensor, directions: Tensor, factors: Sequence[int]) -> Tensor:
    """Return the bucket of each vector, (rows, heads, rounds, n) int64 (section 2, locality sensitive hashing).

    Args:
        x: (rows, heads, n, width).
        directions: of :func:`rotations`.
        factors: of the number of buckets; the first counts ones, the next what the first makes, and so on.
    """
    turned = torch.einsum("bhnw,hwrf->bhrnf", x, directions)
    bucket = torch.zeros(turned.shape[:-1], dtype=torch.int64, device=x.device)
    used, worth = 0, 1
    for factor in factors:
        part = turned[..., used : used + factor // 2]
        bucket = bucket + worth * torch.cat([part, -part], dim=-1).argmax(-1)
        used, worth = used + factor // 2, worth * factor
    return bucket


def adjacent(x: Tensor, before: int, after: int) -> Tensor:
    """Return for each chunk itself and its neighbours, in order.

    Args:
        x: (rows, heads, chunks, places, ...).
        before: neighbours before it.
        after: neighbours after it.

    Returns:
        (rows, heads, chunks, (before + 1 + after) * places, ...).
    """
    if before == after == 0:
        return x
    chunks = x.shape[2]
    # A neighbour farther away than there are chunks is the chunk itself: so the published models were trained.
    turned = [x.roll(-i, dims=2) if abs(i) < chunks else x for i in range(-before, after + 1)]
    return torch.cat(turned, dim=3)


def attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asking: Tensor,
    standing: Tensor,
    present: Tensor | None,
    *,
    causal: bool,
    apart: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return each chunk's attention (rows, heads, chunks, c, width) and its log-sum-exp (rows, heads, chunks, c).

    Args:
        q: (rows, heads, chunks, c, width).
        k: (rows, heads, chunks, e, width), scaled.
        v: (rows, heads, chunks, e, width).
        asking: (rows, heads, chunks, c) int64, where queries stand in the text; rows and heads may be 1.
        standing: (rows, heads, chunks, e) int64, where keys stand.
        present: as standing, bool, False for padding; None for none.
        causal: whether keys behind the query are unseen.
        apart: whether the query's own place is seen only if nothing else is.
        dropout: probability with which a weight is dropped.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2)).to(kind)
    seen = None if present is None else present[..., None, :]
    if causal:
        past = asking[..., :, None] >= standing[..., None, :]
        seen = past if seen is None else seen & past
    if seen is not None:
        scores = scores.masked_fill(~seen, UNSEEN)
    if apart:
        scores = scores.masked_fill(asking[..., :, None] == standing[..., None, :], OWN)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return F.dropout(weights, dropout).to(v.dtype) @ v, lse
