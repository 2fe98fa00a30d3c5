"""A bounded store of exact keys and values, of which each query takes the nearest (Memorizing Transformers, 2022).

After Wu et al. 2022, section 3.1: every head looks for the ``nearest`` keys, weighs their values by a
softmax, and a learned share a head mixes the result with the layer's attention. Keys and queries are of length 1, so
that old keys stay comparable with new ones as the weights learn (section 3.2). There the store takes whole segments;
here a token enters it when it is ``skip`` tokens old, so how a stream is cut does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, at_least
from memtx.memory.base import ContentAttention, Losses, Memory, Readout, Trace, View
from memtx.memory.recurrent import cached_places, newest
from memtx.memory.search import ExactSearch, Search
from memtx.memory.shift import TokenShift
from memtx.ops.attention.reference import weigh
from memtx.ops.linear import Linear
from memtx.ops.visibility import Section, Visibility, visible
from memtx.segment import FAR, Segment
from memtx.state import state

SHARP = 10.0
"""What products of keys and queries of length 1 are multiplied with at the beginning."""


@state
class RetrievalState:
    """The store, and what is too young for it.

    Attributes:
        keys: (rows, capacity + skip - 1, dim), of the newest tokens of the row's document, newest last.
        values: likewise.
        last: (rows, dim), the newest layer input, for the token shift; (rows, 0) where there is none.
    """

    keys: Tensor
    values: Tensor
    last: Tensor


@dataclass(frozen=True)
class _Kept:
    queries: Tensor
    keys: Tensor
    values: Tensor
    last: Tensor
    visibility: Visibility


class RetrievalMemory(Memory[RetrievalState]):
    """The nearest of many exact keys, beside an exact memory.

    Args:
        dim: width of the hidden states.
        capacity: tokens in the store.
        nearest: keys that each head takes for a query.
        skip: how old a token is when it enters the store; younger ones are attention's, so a layer's window is a
            good choice.
        heads: that search, each for itself.
        shift: whether keys see of each token a share of the one before it, so that what followed a key is found by it.
        search: makes what finds the keys: ``ExactSearch`` or ``FaissSearch``, which may miss some in large stores.

    Raises:
        MemtxError: a number is out of range, or heads do not divide dim.
    """

    lasting = False

    def __init__(
        self,
        dim: int,
        capacity: int = 8192,
        nearest: int = 32,
        skip: int = 512,
        heads: int = 4,
        shift: bool = True,
        search: Callable[[], Search] = ExactSearch,
    ) -> None:
        super().__init__(dim)
        at_least(1, capacity=capacity, nearest=nearest, skip=skip)
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the store do not divide.", "Choose a divisor.")
        self.capacity = capacity
        self.nearest = nearest
        self.skip = skip
        self.search = search()
        self.heads = heads
        self.places = capacity + skip - 1
        self.query, self.key, self.value = (Linear(dim, dim, bias=False) for _ in range(3))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(SHARP)))
        self.share = nn.Parameter(torch.zeros(heads))
        self.shift = TokenShift(dim) if shift else None

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"capacity={self.capacity}, nearest={self.nearest}, skip={self.skip}, heads={self.heads}"

    @property
    def cut_matters(self) -> bool:
        """Whether an index, made anew each call, may miss some."""
        return self.search.approximate

    def init_state(self, rows: int, *, like: Tensor) -> RetrievalState:
        """Return an empty store."""
        keys, values = (like.new_zeros(rows, self.places, self.dim) for _ in range(2))
        return RetrievalState(keys, values, like.new_zeros(rows, self.dim if self.shift is not None else 0))

    def _unit(self, x: Tensor) -> Tensor:
        """Make every head's part of (rows, segment, dim) of length 1."""
        return F.normalize(x.view(*x.shape[:-1], self.heads, -1), dim=-1).flatten(-2)

    def read(self, state: RetrievalState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [store | segment]."""
        visibility = segment.once((RetrievalMemory, self.capacity, self.skip), lambda: self._visibility(segment))
        mixed = self.shift(x, state.last, segment) if self.shift is not None else x
        keys = torch.cat([state.keys.to(x.dtype), self._unit(self.key(mixed)).to(x.dtype)], dim=1)
        values = torch.cat([state.values.to(x.dtype), self.value(x).to(x.dtype)], dim=1)
        queries = self._unit(self.query(x)).to(x.dtype)
        last = TokenShift.last(x) if self.shift is not None else state.last
        return View.apart(segment, _Kept(queries, keys, values, last, visibility))

    def _visibility(self, segment: Segment) -> Visibility:
        tick, position, end = cached_places(segment, self.places)
        expires = torch.where(position >= 0, torch.minimum(tick + self.skip + self.capacity, end), -FAR)
        section = Section(tick.shape[1], self.skip - self.places, 1, self.capacity)
        return Visibility(tick + self.skip, expires, segment.length, (section,))

    def recall(self, view: View, q: Tensor) -> Readout:
        """Give the nearest values, by its own queries, laid out over the layer's heads."""
        kept: _Kept = view.kept
        n, heads = kept.queries.shape[1], q.shape[2]
        step = self.search.at_once(kept.queries.shape[0] * self.heads * (self.places + min(n, self.places)))
        parts = [self._found(kept, start, min(start + step, n)) for start in range(0, n, step)]
        out, any_found = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

        def laid(x: Tensor) -> Tensor:
            """(rows, segment, dim) -> (rows, heads, segment, head_dim), by channels in order."""
            return rearrange(x, "r n (h d) -> r h n d", h=heads)

        # Where there was nothing to be found, attention keeps all.
        share = torch.sigmoid(self.share)[:, None].expand(-1, self.dim // self.heads).flatten() * any_found
        return Readout(laid(out), gate=laid(share))

    def _found(self, kept: _Kept, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return (rows, queries, dim) what queries [start, stop) found, and (rows, queries, 1) whether anything."""
        low, high = kept.visibility.sections[0].seen(start, stop)
        if high == low:
            # Still a product of the weights: every parameter takes part in every batch.
            low, high = max(0, low - 1), max(1, high)
        seen = visible(kept.visibility, (start, stop), (low, high))
        q = rearrange(kept.queries[:, start:stop], "r n (h d) -> r h n d", h=self.heads)
        k, v = (rearrange(x[:, low:high], "r n (h d) -> r h n d", h=self.heads) for x in (kept.keys, kept.values))
        with torch.no_grad():
            index, found = self.search.nearest(q, k, seen, min(self.nearest, high - low))
        rows, heads, queries, count = index.shape
        # By index_select over what is flattened: on CPU many times faster than gather by an expanded index.
        base = torch.arange(rows * heads, device=index.device).view(rows, heads, 1, 1) * (high - low)
        flat = (base + index).flatten()

        def taken(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).index_select(0, flat).view(rows, heads, queries, count, -1)

        scale = self.log_scale.exp()[:, None, None].to(q.dtype)
        out, _ = weigh((q[..., None, :] @ taken(k).mT) * scale[..., None], found[..., None, :], taken(v))
        return rearrange(out[..., 0, :], "r h n d -> r n (h d)"), found[:, 0].any(-1, keepdim=True)

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[RetrievalState, Losses]:
        """Keep the newest."""
        kept: _Kept = view.kept
        n = segment.length
        keys, values = (newest(x[:, :-n], x[:, -n:], segment) for x in (kept.keys, kept.values))
        return RetrievalState(keys, values, kept.last), {}
