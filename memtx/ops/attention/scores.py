"""Scores of queries with keys, and with embeddings of their distances."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def compute_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * q k', in float32 or wider even under autocast."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale


def shift_rows(scores: Tensor, first: int, num_keys: int) -> Tensor:
    """Return ``num_keys`` columns of scores ``(..., queries, columns)``, of query i from column ``first`` - i on."""
    num_queries, num_columns = scores.shape[-2:]
    if num_queries == 1:
        return scores[..., first : first + num_keys]
    # In the flattened scores, rows start one less than a row's length apart.
    flat = scores.flatten(-2)[..., first : first + num_queries * (num_columns - 1)]
    return flat.reshape(*scores.shape[:-1], num_columns - 1)[..., :num_keys]


@dataclass(frozen=True)
class EntryCounts:
    """Distances of the entries beyond the exact window, in entries: query[i] - key[j].

    Attributes:
        query: ``(batch or 1, queries)`` int64.
        key: ``(batch or 1, entries)`` int64.
        min_distance: Smallest distance at which the first query sees an entry.
        max_distance: Largest one.
        slope: 1 if both grow by one per query, 0 if they are those of all queries.
    """

    query: Tensor
    key: Tensor
    min_distance: int
    max_distance: int
    slope: int = 0

    def find_bounds(self, query_range: tuple[int, int]) -> tuple[int, int]:
        """Return the smallest and the largest distance at which a block of queries sees an entry."""
        start, stop = query_range
        return self.min_distance + self.slope * start, self.max_distance + self.slope * max(stop - 1, 0)


# Compared by identity, as the other biases are.
@dataclass(frozen=True, eq=False)
class DistanceScores:
    """Scores of each query with an embedding of its distance to each key.

    Terms b and d of Transformer-XL (Dai et al. 2019, section 3.3). The keys are entries with counts, then exact ones of
    consecutive offsets that end with the last query's. The scores depend on queries, so no fused kernel can add them.

    Attributes:
        q: Scaled queries, ``(batch, heads, queries, width)``.
        embedding: Embeddings of the distances 0, 1, 2, ..., ``(heads or 1, distances, width)``; the last one is that of
            all greater distances.
        num_keys: Number of keys.
        counts: Distances of the first keys. None if all are exact.
        num_cached: Number of exact keys before the first query.
        first_key: Keys before those of this part.
    """

    q: Tensor
    embedding: Tensor
    num_keys: int
    counts: EntryCounts | None
    num_cached: int
    first_key: int = 0

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.q.shape[1]

    def narrow(self, first_key: int, num_keys: int) -> DistanceScores:
        """Return the scores of some of the keys."""
        return replace(self, first_key=self.first_key + first_key, num_keys=num_keys)

    def compute_block(self, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
        """Return the scores of a block of queries and keys, ``(batch, heads, queries, keys)``."""
        low, high = (self.first_key + key for key in key_range)
        num_counted = self.counts.key.shape[1] if self.counts is not None else 0
        parts = []
        if low < num_counted:
            parts.append(self._counted(query_range, (low, min(high, num_counted))))
        if high > num_counted or not parts:
            parts.append(self._exact(query_range, (max(low, num_counted) - num_counted, high - num_counted)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _counted(self, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
        assert self.counts is not None
        distance = self.counts.query[:, slice(*query_range), None] - self.counts.key[:, None, slice(*key_range)]
        q, num_distances = self.q[:, :, slice(*query_range)], self.embedding.shape[1]
        low, high = (min(bound, num_distances - 1) for bound in self.counts.find_bounds(query_range))
        scores = compute_scores(q, self.embedding[:, low : high + 1], 1.0)
        index = (distance.clamp(low, high) - low)[:, None]
        return scores.gather(-1, index.expand(q.shape[0], q.shape[1], -1, -1))

    def _exact(self, query_range: tuple[int, int], key_range: tuple[int, int]) -> Tensor:
        (start, stop), (low, high) = query_range, key_range
        queries, keys, q = stop - start, high - low, self.q[:, :, start:stop]
        # Farthest first: column p of row i is the distance of key p - (queries - 1) + i.
        farthest = stop - 1 + self.num_cached - low
        distance = torch.arange(farthest, farthest - (queries + keys - 1), -1, device=q.device)
        embedding = self.embedding[:, distance.clamp(0, self.embedding.shape[1] - 1)]
        return shift_rows(compute_scores(q, embedding, 1.0), queries - 1, keys)
