"""Which keys of a store are nearest to a query: by every product, or by an index of the faiss library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, at_least, missing_package

SCORES = 1 << 22
"""Scores made at a time, at most (16 MiB in float32), unless those of one query are more."""

NOTHING = float("-inf")


class Search(ABC):
    """Finds, for each query, keys among those that it may see.

    Attributes:
        approximate: whether it may miss some, so that what it finds depends on how a stream is cut into calls.
    """

    approximate: bool = True

    @abstractmethod
    def nearest(self, queries: Tensor, keys: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find keys by their product with the queries, without a gradient.

        Args:
            queries: (rows, heads, queries, width).
            keys: (rows, heads, keys, width).
            seen: (rows, queries, keys) bool, whom each query may see.
            count: keys to find, at most as many as there are.

        Returns:
            (rows, heads, queries, count) int64 indices of keys, best first, and bool whether there was one to find.
        """

    def at_once(self, products: int) -> int:
        """Return how many queries are looked at together, where one takes so many products."""
        return max(1, SCORES // products)


class ExactSearch(Search):
    """By every product of a query with a key."""

    approximate = False

    def nearest(self, queries: Tensor, keys: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find the nearest."""
        best, index = (queries @ keys.mT).masked_fill(~seen[:, None], NOTHING).topk(count, dim=-1)
        return index, best > NOTHING


class FaissSearch(Search):
    """By an index of the faiss library (Douze et al. 2024), on the CPU, made anew from what a call can see.

    An index pays for itself in stores of tens of thousands of keys and calls of hundreds of queries (65,536 keys of
    width 64 and 512 queries on one Xeon thread: 70 ms with 256 clusters, 182 ms by every product; "Flat" 302 ms). It
    holds the keys that all queries of a row see; those at the edges, which some see, are searched exactly, as is a
    store with fewer keys than ``least``.

    Args:
        index: what faiss's ``index_factory`` makes, such as "Flat" (exact), "IVF256,Flat" (clusters) or "HNSW32".
        probes: clusters looked at, where the index has some.
        least: keys in an index, at least; for clusters faiss asks for 39 a cluster.

    Raises:
        MemtxError: a number is out of range, faiss is not installed or does not know such an index.
    """

    def __init__(self, index: str = "IVF256,Flat", probes: int = 16, least: int = 10_000) -> None:
        at_least(1, probes=probes, least=least)
        self.index = index
        self.probes = probes
        self.least = least
        self.approximate = index != "Flat"
        self._made(8)

    def _made(self, width: int) -> Any:
        try:
            import faiss
        except ImportError as error:
            raise missing_package("FaissSearch", error, "retrieval") from error
        try:
            made = faiss.index_factory(width, self.index, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise MemtxError(
                f"index is '{self.index}', which faiss does not make of keys of width {width}.",
                "Give one of its index_factory's texts, such as 'Flat', 'IVF256,Flat' or 'HNSW32'.",
            ) from error
        if hasattr(made, "nprobe"):
            made.nprobe = self.probes
        return made

    def at_once(self, products: int) -> int:
        """Return all: an index is made once for them."""
        return 1 << 30

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def nearest(self, queries: Tensor, keys: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find keys that are near, and those at the edges exactly; scores are compared as they are, not as indexed."""
        found = [self._row(*row, count) for row in zip(queries, keys, seen, strict=True)]
        index, any_found = (torch.stack(part) for part in zip(*found, strict=True))
        return index, any_found

    def _row(self, queries: Tensor, keys: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return (heads, queries, count) indices and whether they were found."""
        common = seen.all(0)
        if int(common.sum()) < self.least:
            common = torch.zeros_like(common)
        edges, common = (seen.any(0) & ~common).nonzero()[:, 0], common.nonzero()[:, 0]
        heads, n = queries.shape[:2]
        step = super().at_once(max(1, heads * len(edges)))
        # At the edges each query has its own keys; an index gives the same keys to all.
        parts = [
            self._edges(queries[:, at : at + step], keys, seen[at : at + step], edges, count)
            for at in range(0, n, step)
        ]
        score, index = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        if len(common):
            pairs = [self._indexed(*one, common, count) for one in zip(queries, keys, strict=True)]
            more, where = (torch.stack(part) for part in zip(*pairs, strict=True))
            score, index = torch.cat([score, more], dim=-1), torch.cat([index, where], dim=-1)
        best, order = score.topk(count, dim=-1)
        return index.gather(-1, order), best > NOTHING

    def _edges(self, queries: Tensor, keys: Tensor, seen: Tensor, edges: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return (heads, queries, count) scores among the keys at the edges, and those keys' places."""
        score = (queries @ keys[:, edges].mT).masked_fill(~seen[:, edges], NOTHING)
        # So that there are enough to choose from.
        score = F.pad(score, (0, count), value=NOTHING)
        best, order = score.topk(count, dim=-1)
        return best, F.pad(edges, (0, count))[order]

    def _indexed(self, queries: Tensor, keys: Tensor, common: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return one head's (queries, count) scores among the keys that all see, and those keys' places."""
        made = self._made(keys.shape[-1])
        content = keys[common].float().cpu().numpy()
        made.train(content)
        made.add(content)
        found = torch.from_numpy(made.search(queries.float().cpu().numpy(), count)[1]).to(keys.device)
        where = common[found.clamp(min=0)]
        # An index may hold keys rounded: they are compared as they are.
        score = (keys[where] @ queries[..., None])[..., 0]
        return score.masked_fill(found < 0, NOTHING), where
