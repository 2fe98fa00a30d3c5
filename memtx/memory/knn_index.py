"""Which keys of a store are nearest to a query: by every product, or by an index of the faiss library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, missing_package_error

MAX_SCORES = 1 << 22
"""Scores made at a time, at most (16 MiB in float32), unless those of one query are more."""

NEG_INF = float("-inf")


class KnnIndex(ABC):
    """Finds, for each query, keys among those that it may see.

    Attributes:
        is_approximate: whether it may miss some, so that what it finds depends on how a stream is cut into calls.
    """

    is_approximate: bool = True

    @abstractmethod
    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find keys by their product with the queries, without a gradient.

        Args:
            queries: (rows, heads, queries, width).
            keys: (rows, heads, keys, width).
            mask: (rows, queries, keys) bool, whom each query may see.
            top_k: keys to find, at most as many as there are.

        Returns:
            (rows, heads, queries, top_k) int64 indices of keys, best first, and bool whether there was one to find.
        """

    def query_chunk_size(self, scores_per_query: int) -> int:
        """Return how many queries are looked at together, where one takes so many products."""
        return max(1, MAX_SCORES // scores_per_query)


class ExactIndex(KnnIndex):
    """By every product of a query with a key."""

    is_approximate = False

    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find the nearest."""
        best, index = (queries @ keys.mT).masked_fill(~mask[:, None], NEG_INF).topk(top_k, dim=-1)
        return index, best > NEG_INF


class FaissIndex(KnnIndex):
    """By an index of the faiss library (Douze et al. 2024), on the CPU, made anew from what a call can see.

    An index pays for itself in stores of tens of thousands of keys and calls of hundreds of queries (65,536 keys of
    width 64 and 512 queries on one Xeon thread: 70 ms with 256 clusters, 182 ms by every product; "Flat" 302 ms). It
    holds the keys that all queries of a row see; those at the edges, which some see, are searched exactly, as is a
    store with fewer keys than ``min_keys``.

    Args:
        index_factory: what faiss's ``index_factory`` makes, such as "Flat" (exact), "IVF256,Flat" (clusters) or
            "HNSW32".
        nprobe: clusters looked at, where the index has some.
        min_keys: keys in an index, at least; for clusters faiss asks for 39 a cluster.

    Raises:
        MemtxError: a number is out of range, faiss is not installed or does not know such an index.
    """

    def __init__(self, index_factory: str = "IVF256,Flat", nprobe: int = 16, min_keys: int = 10_000) -> None:
        check_at_least(1, nprobe=nprobe, min_keys=min_keys)
        self.index_factory = index_factory
        self.nprobe = nprobe
        self.min_keys = min_keys
        self.is_approximate = index_factory != "Flat"
        self._build_index(8)

    def _build_index(self, dim: int) -> Any:
        try:
            import faiss
        except ImportError as error:
            raise missing_package_error("FaissIndex", error, "retrieval") from error
        try:
            made = faiss.index_factory(dim, self.index_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise MemtxError(
                f"index_factory is '{self.index_factory}', which faiss does not make of keys of width {dim}.",
                "Give one of its index_factory's texts, such as 'Flat', 'IVF256,Flat' or 'HNSW32'.",
            ) from error
        if hasattr(made, "nprobe"):
            made.nprobe = self.nprobe
        return made

    def query_chunk_size(self, scores_per_query: int) -> int:
        """Return all: an index is made once for them."""
        return 1 << 30

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find keys that are near, and those at the edges exactly; scores are compared as they are, not as indexed."""
        found = [self._search_stream(*row, top_k) for row in zip(queries, keys, mask, strict=True)]
        index, any_found = (torch.stack(part) for part in zip(*found, strict=True))
        return index, any_found

    def _search_stream(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return (heads, queries, top_k) indices and whether they were found."""
        common = mask.all(0)
        if int(common.sum()) < self.min_keys:
            common = torch.zeros_like(common)
        edges, common = (mask.any(0) & ~common).nonzero()[:, 0], common.nonzero()[:, 0]
        heads, n = queries.shape[:2]
        step = super().query_chunk_size(max(1, heads * len(edges)))
        # At the edges each query has its own keys; an index gives the same keys to all.
        parts = [
            self._search_exact(queries[:, at : at + step], keys, mask[at : at + step], edges, top_k)
            for at in range(0, n, step)
        ]
        score, index = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        if len(common):
            pairs = [self._search_index(*one, common, top_k) for one in zip(queries, keys, strict=True)]
            more, where = (torch.stack(part) for part in zip(*pairs, strict=True))
            score, index = torch.cat([score, more], dim=-1), torch.cat([index, where], dim=-1)
        best, order = score.topk(top_k, dim=-1)
        return index.gather(-1, order), best > NEG_INF

    def _search_exact(
        self, queries: Tensor, keys: Tensor, mask: Tensor, candidates: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Return (heads, queries, top_k) scores among the keys at the edges, and those keys' places."""
        score = (queries @ keys[:, candidates].mT).masked_fill(~mask[:, candidates], NEG_INF)
        # So that there are enough to choose from.
        score = F.pad(score, (0, top_k), value=NEG_INF)
        best, order = score.topk(top_k, dim=-1)
        return best, F.pad(candidates, (0, top_k))[order]

    def _search_index(self, queries: Tensor, keys: Tensor, candidates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return one head's (queries, top_k) scores among the keys that all see, and those keys' places."""
        made = self._build_index(keys.shape[-1])
        content = keys[candidates].float().cpu().numpy()
        made.train(content)
        made.add(content)
        found = torch.from_numpy(made.search(queries.float().cpu().numpy(), top_k)[1]).to(keys.device)
        where = candidates[found.clamp(min=0)]
        # An index may hold keys rounded: they are compared as they are.
        score = (keys[where] @ queries[..., None])[..., 0]
        return score.masked_fill(found < 0, NEG_INF), where
