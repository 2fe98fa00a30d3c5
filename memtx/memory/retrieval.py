"""A bounded store of exact keys and values from which each query takes the nearest (Memorizing Transformers).

As in Wu et al. 2022, section 3.1, every head finds its ``top_k`` nearest keys, weighs their values by a softmax, and a
learned gate per head mixes the result with the layer's attention. Keys and queries have unit length, so that old keys
stay comparable with new ones while the weights learn (section 3.2). The paper stores whole segments; here a token
enters the store when it is ``exclude_recent`` tokens old, so results do not depend on segmentation. As published, the
layer's own keys and values are stored, without gradients (``layer_projections``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_divisible, missing_package_error
from memtx.memory.base import ContentAttention, Memory, Readout, View, project_by_layer
from memtx.memory.parts import TokenShift, gather_entries, merge_heads, split_heads
from memtx.memory.recurrent import sliding_window, update_cache
from memtx.ops.attention.mask import Visibility, create_mask
from memtx.ops.attention.reference import softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment
from memtx.state import state_dataclass

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
            Indices of keys, best first, ``(batch, heads, queries, top_k)`` int64, and a mask of those found, bool.
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
        index, is_match = (torch.stack(tensors) for tensors in zip(*results, strict=True))
        return index, is_match

    def _search_stream(self, queries: Tensor, keys: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the indices of one stream, ``(heads, queries, top_k)``, and a mask of those found."""
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


@state_dataclass
class RetrievalState:
    """The store and the tokens too recent for it.

    Attributes:
        keys: Keys of the newest tokens of the open document, newest last,
            ``(batch, capacity + exclude_recent - 1, dim)``.
        values: Their values, in the same shape.
        last_input: Last layer input, for the token shift, ``(batch, dim)``; ``(batch, 0)`` without one.
    """

    keys: Tensor
    values: Tensor
    last_input: Tensor


@dataclass(frozen=True)
class _ReadContext:
    queries: Tensor
    keys: Tensor
    values: Tensor
    visibility: Visibility


class RetrievalMemory(Memory[RetrievalState]):
    """The nearest of many exact keys, next to an exact memory.

    Args:
        dim: Width of the hidden states.
        capacity: Tokens in the store.
        top_k: Keys that each head takes per query.
        exclude_recent: Age in tokens at which a token enters the store; attention covers the younger ones, so the
            layer's window is a good choice.
        heads: Heads that search independently; those of the layer with ``layer_projections``.
        token_shift: If True, keys mix each token with the previous one, so that a key finds its successor. Defaults to
            True for keys of the memory's own.
        knn_index: Factory of the search: ``ExactIndex``, or ``FaissIndex``, which may miss some keys in large stores.
        layer_projections: If True, search with the layer's queries and store its keys and values, all without
            positions, and no gradient reaches what is stored (sections 3.1 and 3.2).

    Raises:
        MemtxError: A number is out of range, dim is not divisible by heads, or the layer's keys shall be shifted.
    """

    unbounded = False
    gate_parameters = ("mix_gate", "log_scale")

    def __init__(
        self,
        dim: int,
        capacity: int = 8192,
        top_k: int = 32,
        exclude_recent: int = 512,
        heads: int = 4,
        token_shift: bool | None = None,
        knn_index: Callable[[], KnnIndex] = ExactIndex,
        layer_projections: bool = False,
    ) -> None:
        super().__init__(dim)
        check_at_least(1, capacity=capacity, top_k=top_k, exclude_recent=exclude_recent)
        check_divisible("Choose a divisor for RetrievalMemory's heads.", dim=dim, heads=heads)
        self.capacity = capacity
        self.top_k = top_k
        self.exclude_recent = exclude_recent
        self.knn_index = knn_index()
        self.depends_on_segmentation = self.knn_index.is_approximate
        self.heads = heads
        self.cache_length = capacity + exclude_recent - 1
        if layer_projections and token_shift:
            message = "token_shift is True with layer_projections, which take the layer's keys as they are."
            raise MemtxError(message, "Remove one of the two.")
        self.layer_projections = layer_projections
        if not layer_projections:
            self.query, self.key, self.value = (Linear(dim, dim, bias=False) for _ in range(3))
        # Products of unit-length keys and queries are initially multiplied by 10.
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(10.0)))
        # Nearly closed: untrained neighbors would otherwise replace half of the attention from the first step on.
        self.mix_gate = nn.Parameter(torch.full((heads,), -3.0))
        shifts = token_shift if token_shift is not None else not layer_projections
        self.token_shift = TokenShift(dim) if shifts else None

    def init_state(self, batch_size: int, *, like: Tensor) -> RetrievalState:
        """Return an empty store."""
        keys, values = (like.new_zeros(batch_size, self.cache_length, self.dim) for _ in range(2))
        return RetrievalState(keys, values, like.new_zeros(batch_size, self.dim if self.token_shift is not None else 0))

    def read(self, state: RetrievalState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [store | segment]."""
        settings = (self.cache_length, self.capacity, self.exclude_recent)
        window = segment.memo((RetrievalMemory, *settings), lambda: sliding_window(segment, *settings))
        if self.layer_projections:
            q, k, v = project_by_layer(self, self.heads, x, attention, "query", "key", "value")
            parts = q, k.detach(), v.detach()
        else:
            shifted = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
            parts = self.query(x), self.key(shifted), self.value(x)
        queries, new_keys = (self._normalize_heads(part).to(x.dtype) for part in parts[:2])
        old_keys, old_values, new_values = state.keys.to(x.dtype), state.values.to(x.dtype), parts[2].to(x.dtype)
        keys, values = torch.cat([old_keys, new_keys], dim=1), torch.cat([old_values, new_values], dim=1)
        next_state = RetrievalState(
            update_cache(old_keys, new_keys, segment),
            update_cache(old_values, new_values, segment),
            TokenShift.last_input(x) if self.token_shift is not None else state.last_input,
        )
        return View.readout_only(segment, _ReadContext(queries, keys, values, window.visibility), next_state)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return the values retrieved by the memory's own queries, split into the layer's heads."""
        context: _ReadContext = view.context
        (batch_size, length, _), heads = context.queries.shape, q.shape[2]
        scores_per_query = batch_size * self.heads * (self.cache_length + min(length, self.cache_length))
        step = self.knn_index.query_chunk_size(scores_per_query)
        chunks = [self._retrieve(context, start, min(start + step, length)) for start in range(0, length, step)]
        out, has_match = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        # Attention keeps its full share where nothing was retrieved.
        gate = torch.sigmoid(self.mix_gate).repeat_interleave(self.dim // self.heads) * has_match
        return Readout(split_heads(out, heads), gate=split_heads(gate, heads))

    def _normalize_heads(self, x: Tensor) -> Tensor:
        """Normalize each head's part of x ``(batch, length, dim)`` to unit length."""
        return F.normalize(x.view(*x.shape[:-1], self.heads, -1), dim=-1).flatten(-2)

    def _retrieve(self, context: _ReadContext, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the values ``(batch, queries, dim)`` for queries [start, stop), and True for those with any key."""
        low, high = context.visibility.key_ranges[0].find_visible_keys(start, stop)
        if high == low:
            # Search a key that nobody sees, so that every parameter takes part in every batch.
            low, high = max(0, low - 1), max(1, high)
        mask = create_mask(context.visibility, (start, stop), (low, high))
        q = split_heads(context.queries[:, start:stop], self.heads)
        k, v = (split_heads(x[:, low:high], self.heads) for x in (context.keys, context.values))
        with torch.no_grad():
            index, is_match = self.knn_index.search(q, k, mask, min(self.top_k, high - low))
        k, v = (gather_entries(x.flatten(0, 1), index.flatten(0, 1)).view(*index.shape, -1) for x in (k, v))
        scale = self.log_scale.exp()[:, None, None].to(q.dtype)
        out, _ = softmax_attention((q[..., None, :] @ k.mT) * scale[..., None], is_match[..., None, :], v)
        return merge_heads(out[..., 0, :]), is_match[:, 0].any(-1, keepdim=True)
