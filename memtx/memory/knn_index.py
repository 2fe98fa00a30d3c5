"""Nearest-neighbor search among the keys of a store, exact or with an index of the faiss library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, missing_package_error

MAX_SCORES = 1 << 22
"""Most scores computed at a time (16 MiB in float32), unless a single query needs more."""


class KnnIndex(ABC):
    """A search for the visible keys with the largest products with a query.

    Attributes:
        is_approximate: If True, keys may be missed, so that results depend on segmentation.
    """

    is_approximate: bool = True

    @abstractmethod
    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find keys by their product with the queries, without gradients.

        Args:
            queries: Queries, ``(batch, heads, queries, width)``.
            keys: Keys, ``(batch, heads, keys, width)``.
            mask: True for visible keys, ``(batch, queries, keys)`` bool.
            top_k: Number of keys to find, at most the number of keys.

        Returns:
            Indices of keys, best first, ``(batch, heads, queries, top_k)`` int64, and whether each was found, bool.
        """

    def query_chunk_size(self, scores_per_query: int) -> int:
        """Return how many queries to search at a time."""
        return max(1, MAX_SCORES // scores_per_query)


class ExactIndex(KnnIndex):
    """Exact search over the products of all queries and keys."""

    is_approximate = False

    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find the nearest keys."""
        best, index = (queries @ keys.mT).masked_fill(~mask[:, None], -torch.inf).topk(top_k, dim=-1)
        return index, best > -torch.inf


class FaissIndex(KnnIndex):
    """Search with an index of the faiss library (Douze et al. 2024) on the CPU, rebuilt in each call.

    An index pays off for stores of tens of thousands of keys and calls of hundreds of queries (65,536 keys of width 64
    and 512 queries on one Xeon thread: 70 ms with 256 clusters, 182 ms for exact search, 302 ms with "Flat"). It holds
    the keys that all queries of a stream see. Keys that only some of them see are searched exactly, as is a store of
    fewer than ``min_keys`` keys.

    Args:
        index_factory: Description for faiss's ``index_factory``, such as "Flat" (exact), "IVF256,Flat" (clusters) or
            "HNSW32".
        nprobe: Clusters searched, if the index has clusters.
        min_keys: Smallest number of keys worth an index; faiss asks for 39 per cluster.

    Raises:
        MemtxError: A number is out of range, faiss is not installed, or it does not know ``index_factory``.
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
            index = faiss.index_factory(dim, self.index_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise MemtxError(
                f"index_factory is '{self.index_factory}', which faiss cannot build for keys of width {dim}.",
                "Give a description that faiss knows, such as 'Flat', 'IVF256,Flat' or 'HNSW32'.",
            ) from error
        if hasattr(index, "nprobe"):
            index.nprobe = self.nprobe
        return index

    def query_chunk_size(self, scores_per_query: int) -> int:
        """Return a chunk size without limit, so that an index is built once per call."""
        return 1 << 30

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def search(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find near keys; candidates are compared by their exact products."""
        results = [self._search_stream(*stream, top_k) for stream in zip(queries, keys, mask, strict=True)]
        index, found = (torch.stack(tensors) for tensors in zip(*results, strict=True))
        return index, found

    def _search_stream(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return indices, ``(heads, queries, top_k)``, and whether each was found."""
        in_index = mask.all(0)
        if int(in_index.sum()) < self.min_keys:
            in_index = torch.zeros_like(in_index)
        rest, indexed = (mask.any(0) & ~in_index).nonzero()[:, 0], in_index.nonzero()[:, 0]
        heads, num_queries = queries.shape[:2]
        step = super().query_chunk_size(max(1, heads * len(rest)))
        chunks = [
            self._search_exact(queries[:, start : start + step], keys, mask[start : start + step], rest, top_k)
            for start in range(0, num_queries, step)
        ]
        scores, index = (torch.cat(tensors, dim=1) for tensors in zip(*chunks, strict=True))
        if len(indexed):
            results = [self._search_index(*head, indexed, top_k) for head in zip(queries, keys, strict=True)]
            more_scores, more_index = (torch.stack(tensors) for tensors in zip(*results, strict=True))
            scores, index = torch.cat([scores, more_scores], dim=-1), torch.cat([index, more_index], dim=-1)
        best, order = scores.topk(top_k, dim=-1)
        return index.gather(-1, order), best > -torch.inf

    def _search_exact(
        self, queries: Tensor, keys: Tensor, mask: Tensor, candidates: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the best scores among the candidates and their indices, ``(heads, queries, top_k)``."""
        scores = (queries @ keys[:, candidates].mT).masked_fill(~mask[:, candidates], -torch.inf)
        # Padded, so that top_k has enough to choose from.
        best, order = F.pad(scores, (0, top_k), value=-torch.inf).topk(top_k, dim=-1)
        return best, F.pad(candidates, (0, top_k))[order]

    def _search_index(self, queries: Tensor, keys: Tensor, candidates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return one head's scores among the indexed candidates and their indices, ``(queries, top_k)``."""
        index = self._build_index(keys.shape[-1])
        vectors = keys[candidates].float().cpu().numpy()
        index.train(vectors)
        index.add(vectors)
        nearest = torch.from_numpy(index.search(queries.float().cpu().numpy(), top_k)[1]).to(keys.device)
        key_index = candidates[nearest.clamp(min=0)]
        # An index may round its keys, so scores are computed from the original ones.
        scores = (keys[key_index] @ queries[..., None])[..., 0]
        return scores.masked_fill(nearest < 0, -torch.inf), key_index
