"""A bounded store of exact keys and values, of which each query takes the nearest (Memorizing Transformers, 2022).

After Wu et al. 2022, section 3.1: every head looks for the ``top_k`` nearest keys, weighs their values by a
softmax, and a learned share a head mixes the result with the layer's attention. Keys and queries are of length 1, so
that old keys stay comparable with new ones as the weights learn (section 3.2). There the store takes whole segments;
here a token enters it when it is ``exclude_recent`` tokens old, so how a stream is cut does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.memory.knn_index import ExactIndex, KnnIndex
from memtx.memory.recurrent import locate_entries, update_cache
from memtx.memory.shift import TokenShift
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask
from memtx.ops.attention.reference import softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass

INITIAL_SCALE = 10.0
"""What products of keys and queries of length 1 are multiplied with at the beginning."""


@state_dataclass
class RetrievalState:
    """The store, and what is too young for it.

    Attributes:
        keys: (rows, capacity + exclude_recent - 1, dim), of the newest tokens of the row's document, newest last.
        values: likewise.
        last_input: (rows, dim), the newest layer input, for the token shift; (rows, 0) where there is none.
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
    """The nearest of many exact keys, beside an exact memory.

    Args:
        dim: width of the hidden states.
        capacity: tokens in the store.
        top_k: keys that each head takes for a query.
        exclude_recent: how old a token is when it enters the store; younger ones are attention's, so a layer's window
            is a good choice.
        heads: that search, each for itself.
        token_shift: whether keys see of each token a share of the one before it, so that what followed a key is found
            by it.
        knn_index: makes what finds the keys: ``ExactIndex`` or ``FaissIndex``, which may miss some in large stores.

    Raises:
        MemtxError: a number is out of range, or heads do not divide dim.
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
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the store do not divide.", "Choose a divisor.")
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

    def extra_repr(self) -> str:
        """Say the settings."""
        sizes = f"capacity={self.capacity}, top_k={self.top_k}, exclude_recent={self.exclude_recent}"
        return f"{sizes}, heads={self.heads}"

    @property
    def depends_on_segmentation(self) -> bool:
        """Whether an index, made anew each call, may miss some."""
        return self.knn_index.is_approximate

    def init_state(self, batch_size: int, *, like: Tensor) -> RetrievalState:
        """Return an empty store."""
        keys, values = (like.new_zeros(batch_size, self.cache_length, self.dim) for _ in range(2))
        return RetrievalState(keys, values, like.new_zeros(batch_size, self.dim if self.token_shift is not None else 0))

    def _normalize_heads(self, x: Tensor) -> Tensor:
        """Make every head's part of (rows, segment, dim) of length 1."""
        return F.normalize(x.view(*x.shape[:-1], self.heads, -1), dim=-1).flatten(-2)

    def read(self, state: RetrievalState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [store | segment]."""
        visibility = segment.memo(
            (RetrievalMemory, self.capacity, self.exclude_recent), lambda: self._visibility(segment)
        )
        mixed = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
        keys = torch.cat([state.keys.to(x.dtype), self._normalize_heads(self.key(mixed)).to(x.dtype)], dim=1)
        values = torch.cat([state.values.to(x.dtype), self.value(x).to(x.dtype)], dim=1)
        queries = self._normalize_heads(self.query(x)).to(x.dtype)
        last = TokenShift.last_input(x) if self.token_shift is not None else state.last_input
        return View.readout_only(segment, _ReadContext(queries, keys, values, last, visibility))

    def _visibility(self, segment: Segment) -> Visibility:
        tick, position, end = locate_entries(segment, self.cache_length)
        expires = torch.where(
            position >= 0, torch.minimum(tick + self.exclude_recent + self.capacity, end), -INFINITE_OFFSET
        )
        section = KeyRange(tick.shape[1], self.exclude_recent - self.cache_length, 1, self.capacity)
        return Visibility(tick + self.exclude_recent, expires, segment.length, (section,))

    def readout(self, view: View, q: Tensor) -> Readout:
        """Give the nearest values, by its own queries, laid out over the layer's heads."""
        kept: _ReadContext = view.context
        n, heads = kept.queries.shape[1], q.shape[2]
        step = self.knn_index.query_chunk_size(
            kept.queries.shape[0] * self.heads * (self.cache_length + min(n, self.cache_length))
        )
        parts = [self._retrieve(kept, start, min(start + step, n)) for start in range(0, n, step)]
        out, any_found = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

        def laid(x: Tensor) -> Tensor:
            """(rows, segment, dim) -> (rows, heads, segment, head_dim), by channels in order."""
            return rearrange(x, "r n (h d) -> r h n d", h=heads)

        # Where there was nothing to be found, attention keeps all.
        share = torch.sigmoid(self.mix_gate)[:, None].expand(-1, self.dim // self.heads).flatten() * any_found
        return Readout(laid(out), gate=laid(share))

    def _retrieve(self, context: _ReadContext, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (rows, queries, dim) what queries [start, stop) found, and (rows, queries, 1) whether anything."""
        low, high = context.visibility.key_ranges[0].find_visible_keys(start, stop)
        if high == low:
            # Still a product of the weights: every parameter takes part in every batch.
            low, high = max(0, low - 1), max(1, high)
        seen = create_mask(context.visibility, (start, stop), (low, high))
        q = rearrange(context.queries[:, start:stop], "r n (h d) -> r h n d", h=self.heads)
        k, v = (rearrange(x[:, low:high], "r n (h d) -> r h n d", h=self.heads) for x in (context.keys, context.values))
        with torch.no_grad():
            index, found = self.knn_index.search(q, k, seen, min(self.top_k, high - low))
        rows, heads, queries, count = index.shape
        # By index_select over what is flattened: on CPU many times faster than gather by an expanded index.
        base = torch.arange(rows * heads, device=index.device).view(rows, heads, 1, 1) * (high - low)
        flat = (base + index).flatten()

        def taken(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).index_select(0, flat).view(rows, heads, queries, count, -1)

        scale = self.log_scale.exp()[:, None, None].to(q.dtype)
        out, _ = softmax_attention((q[..., None, :] @ taken(k).mT) * scale[..., None], found[..., None, :], taken(v))
        return rearrange(out[..., 0, :], "r h n d -> r n (h d)"), found[:, 0].any(-1, keepdim=True)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[RetrievalState, Losses]:
        """Keep the newest."""
        kept: _ReadContext = view.context
        n = segment.length
        keys, values = (update_cache(x[:, :-n], x[:, -n:], segment) for x in (kept.keys, kept.values))
        return RetrievalState(keys, values, kept.last_input), {}
