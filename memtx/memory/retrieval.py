"""A bounded store of exact keys and values from which each query takes the nearest (Memorizing Transformers).

As in Wu et al. 2022, section 3.1, every head finds its ``top_k`` nearest keys, weighs their values by a softmax, and a
learned gate per head mixes the result with the layer's attention. Keys and queries have unit length, so that old keys
stay comparable with new ones while the weights learn (section 3.2). The paper stores whole segments; here a token
enters the store when it is ``exclude_recent`` tokens old, so results do not depend on segmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_at_least, check_divisible
from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.memory.knn_index import ExactIndex, KnnIndex
from memtx.memory.parts import TokenShift, gather_entries, merge_heads, split_heads
from memtx.memory.recurrent import locate_entries, update_cache
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask
from memtx.ops.attention.reference import softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass

INITIAL_SCALE = 10.0
"""Initial factor of the products of unit-length keys and queries."""


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
    last_input: Tensor
    visibility: Visibility


class RetrievalMemory(Memory[RetrievalState]):
    """The nearest of many exact keys, next to an exact memory.

    Args:
        dim: Width of the hidden states.
        capacity: Tokens in the store.
        top_k: Keys that each head takes per query.
        exclude_recent: Age in tokens at which a token enters the store; attention covers the younger ones, so the
            layer's window is a good choice.
        heads: Heads that search independently.
        token_shift: If True, keys mix each token with the previous one, so that a key finds its successor.
        knn_index: Factory of the search: ``ExactIndex``, or ``FaissIndex``, which may miss some keys in large stores.

    Raises:
        MemtxError: A number is out of range, or dim is not divisible by heads.
    """

    unbounded = False

    def __init__(
        self,
        dim: int,
        capacity: int = 8192,
        top_k: int = 32,
        exclude_recent: int = 512,
        heads: int = 4,
        token_shift: bool = True,
        knn_index: Callable[[], KnnIndex] = ExactIndex,
    ) -> None:
        super().__init__(dim)
        check_at_least(1, capacity=capacity, top_k=top_k, exclude_recent=exclude_recent)
        check_divisible("Choose a divisor for RetrievalMemory's heads.", dim=dim, heads=heads)
        self.capacity = capacity
        self.top_k = top_k
        self.exclude_recent = exclude_recent
        self.knn_index = knn_index()
        self.heads = heads
        self.cache_length = capacity + exclude_recent - 1
        self.query, self.key, self.value = (Linear(dim, dim, bias=False) for _ in range(3))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(INITIAL_SCALE)))
        self.mix_gate = nn.Parameter(torch.zeros(heads))
        self.token_shift = TokenShift(dim) if token_shift else None

    @property
    def depends_on_segmentation(self) -> bool:
        """True if the index, rebuilt in each call, may miss some keys."""
        return self.knn_index.is_approximate

    def init_state(self, batch_size: int, *, like: Tensor) -> RetrievalState:
        """Return an empty store."""
        keys, values = (like.new_zeros(batch_size, self.cache_length, self.dim) for _ in range(2))
        return RetrievalState(keys, values, like.new_zeros(batch_size, self.dim if self.token_shift is not None else 0))

    def read(self, state: RetrievalState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [store | segment]."""
        settings = (RetrievalMemory, self.capacity, self.exclude_recent)
        visibility = segment.memo(settings, lambda: self._visibility(segment))
        shifted = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
        keys = torch.cat([state.keys.to(x.dtype), self._normalize_heads(self.key(shifted)).to(x.dtype)], dim=1)
        values = torch.cat([state.values.to(x.dtype), self.value(x).to(x.dtype)], dim=1)
        queries = self._normalize_heads(self.query(x)).to(x.dtype)
        last_input = TokenShift.last_input(x) if self.token_shift is not None else state.last_input
        return View.readout_only(segment, _ReadContext(queries, keys, values, last_input, visibility))

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return the values found by the memory's own queries, split into the layer's heads."""
        context: _ReadContext = view.context
        (batch_size, length, _), heads = context.queries.shape, q.shape[2]
        scores_per_query = batch_size * self.heads * (self.cache_length + min(length, self.cache_length))
        step = self.knn_index.query_chunk_size(scores_per_query)
        chunks = [self._retrieve(context, start, min(start + step, length)) for start in range(0, length, step)]
        out, has_match = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        # Attention keeps everything where nothing was found.
        gate = torch.sigmoid(self.mix_gate).repeat_interleave(self.dim // self.heads) * has_match
        return Readout(split_heads(out, heads), gate=split_heads(gate, heads))

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[RetrievalState, Losses]:
        """Keep the newest keys and values."""
        context: _ReadContext = view.context
        length = segment.length
        keys, values = (update_cache(x[:, :-length], x[:, -length:], segment) for x in (context.keys, context.values))
        return RetrievalState(keys, values, context.last_input), {}

    def _normalize_heads(self, x: Tensor) -> Tensor:
        """Normalize each head's part of x ``(batch, length, dim)`` to unit length."""
        return F.normalize(x.view(*x.shape[:-1], self.heads, -1), dim=-1).flatten(-2)

    def _visibility(self, segment: Segment) -> Visibility:
        offset, position, document_end = locate_entries(segment, self.cache_length)
        visible_until = torch.minimum(offset + self.exclude_recent + self.capacity, document_end)
        visible_until = torch.where(position >= 0, visible_until, -INFINITE_OFFSET)
        key_range = KeyRange(offset.shape[1], self.exclude_recent - self.cache_length, 1, self.capacity)
        return Visibility(offset + self.exclude_recent, visible_until, segment.length, (key_range,))

    def _retrieve(self, context: _ReadContext, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Retrieve for the queries [start, stop).

        Returns:
            Retrieved values ``(batch, queries, dim)``, and whether a query found any key, ``(batch, queries, 1)`` bool.
        """
        low, high = context.visibility.key_ranges[0].find_visible_keys(start, stop)
        if high == low:
            # Search a key that nobody sees, so that every parameter takes part in every batch.
            low, high = max(0, low - 1), max(1, high)
        mask = create_mask(context.visibility, (start, stop), (low, high))
        q = split_heads(context.queries[:, start:stop], self.heads)
        k, v = (split_heads(x[:, low:high], self.heads) for x in (context.keys, context.values))
        with torch.no_grad():
            index, found = self.knn_index.search(q, k, mask, min(self.top_k, high - low))
        k, v = (gather_entries(x.flatten(0, 1), index.flatten(0, 1)).view(*index.shape, -1) for x in (k, v))
        scale = self.log_scale.exp()[:, None, None].to(q.dtype)
        out, _ = softmax_attention((q[..., None, :] @ k.mT) * scale[..., None], found[..., None, :], v)
        return merge_heads(out[..., 0, :]), found[:, 0].any(-1, keepdim=True)
