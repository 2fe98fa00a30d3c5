"""An associative memory of fixed size: a matrix a head that keys write values into and queries read them from.

By the delta rule what a key held is taken out as its new value goes in (Schlag et al. 2021, section 4.2), with decay
it is the gated delta rule (Yang et al. 2024). Both are recurrences over tokens, computed by chunks, so how a stream
is cut does not matter. Settings lead to published memories, with ``decay=None``:

- Infini-attention (Munkhdalai et al. 2024, section 3.1): ``feature=Elu, share=True``, ``erase`` for its delta
  variant. There the memory is written once a segment; here at every token, as if segments had one.
- ARMT (Rodkin et al. 2024, section 3): ``feature=Dpfp``, there written by memory tokens alone, here by all that the
  write gate lets through.
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
from memtx.memory.features import Feature, Unit
from memtx.memory.gates import Gate
from memtx.memory.shift import TokenShift
from memtx.ops.delta_rule import chunked
from memtx.ops.linear import Linear
from memtx.segment import Segment
from memtx.state import state


@state
class AssociativeState:
    """The matrices.

    Attributes:
        matrix: (rows, heads, feature width, value width), float32 at least: small writes must add up.
        last: (rows, dim), the newest layer input of the row's document, for the token shift.
    """

    matrix: Tensor
    last: Tensor


@dataclass(frozen=True)
class _Kept:
    out: Tensor
    strength: Tensor
    after: AssociativeState


class AssociativeMemory(Memory[AssociativeState]):
    """Fast weights beside an exact memory, with projections of their own.

    A token of the document so far is stored with the one before it in view: keys, values, queries and gates are made
    of inputs shifted by one token in part, so that "what came after this" can be stored at once.

    Args:
        dim: width of the hidden states.
        heads: matrices.
        key_dim: width of a head's keys; dim / heads by default.
        erase: the delta rule; False for linear attention, whose reads are means where the feature is positive.
        feature: makes the feature map of keys and queries from key_dim.
        write: makes the write gate from (dim, heads); ``ReflectingGate`` for what must be kept track of in order,
            beside no decay.
        decay: makes the gate of forgetting from (dim, heads); None for keeping all, which what is asked for from far
            away needs and running text does not (scripts/compare_memories.py). Heads begin to forget at rates from what
            the gate says down to a thousandth of it, as retention does at several scales (Sun et al. 2023, section
            2.2), so that some keep long from the first step on.
        share: False: what is read is added to the attention. True: by a learned share a head that attention loses.
        cost: weight of the mean write gate as a loss, a price on writing. Gates that are open a little wherever
            nothing is to be learned do no harm at the trained lengths and drown the memory in a stream a hundred
            times longer: a tenth of what an answer weighs closed them (scripts/measure_recall.py).

    Raises:
        MemtxError: numbers do not divide as they must, or are out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        key_dim: int | None = None,
        erase: bool = True,
        feature: Callable[[int], Feature] = Unit,
        write: Callable[[int, int], Gate] = Gate,
        decay: Callable[[int, int], Gate] | None = Gate,
        share: bool = False,
        cost: float = 0.0,
    ) -> None:
        super().__init__(dim)
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the memory do not divide.", "Choose a divisor.")
        key_dim = key_dim if key_dim is not None else dim // heads
        at_least(1, key_dim=key_dim)
        at_least(0, cost=cost)
        self.heads = heads
        self.value_dim = dim // heads
        self.erase = erase
        self.cost = cost
        self.feature = feature(key_dim)
        self.query = Linear(dim, heads * key_dim, bias=False)
        self.key = Linear(dim, heads * key_dim, bias=False)
        self.value = Linear(dim, dim, bias=False)
        self.write_gate = write(dim, heads)
        self.decay_gate = decay(dim, heads) if decay is not None else None
        self.shift = TokenShift(dim)
        slowest = -math.log(1000.0)
        self.log_rate = nn.Parameter(torch.linspace(0.0, slowest, heads)) if decay is not None else None
        self.share = nn.Parameter(torch.zeros(heads)) if share else None

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"heads={self.heads}, erase={self.erase}, cost={self.cost}"

    @property
    def averages(self) -> bool:
        """Whether a read is divided by the weights that it was summed with."""
        return self.feature.positive and not self.erase

    def init_state(self, rows: int, *, like: Tensor) -> AssociativeState:
        """Return empty matrices."""
        shape = (rows, self.heads, self.feature.width, self.value_dim + self.averages)
        kind = torch.promote_types(like.dtype, torch.float32)
        return AssociativeState(like.new_zeros(shape, dtype=kind), like.new_zeros(rows, self.dim))

    def read(self, state: AssociativeState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write and read every token in order."""
        mixed = self.shift(x, state.last, segment)
        kind = torch.promote_types(x.dtype, torch.float32)
        q, k = (self.feature(self._by_head(part(mixed), kind)) for part in (self.query, self.key))
        v = self._by_head(self.value(mixed), kind)
        if self.averages:
            v = F.pad(v, (0, 1), value=1.0)
        strength = self._by_head(self.write_gate(mixed), kind)[..., 0]
        log_decay = None
        if self.decay_gate is not None and self.log_rate is not None:
            forgets = self._by_head(self.decay_gate(mixed), kind)[..., 0]
            log_decay = -self.log_rate.to(kind).exp()[:, None] * forgets
        starts = segment.position == 0
        out, matrix = chunked(q, k, v, strength, log_decay, state.matrix.to(kind), starts, erase=self.erase)
        if self.averages:
            # Nothing was written: nothing is read.
            out = out[..., :-1] / out[..., -1:].clamp(min=torch.finfo(kind).eps)
        return View.apart(segment, _Kept(out, strength, AssociativeState(matrix, TokenShift.last(x))))

    def _by_head(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """(rows, segment, heads * width) -> (rows, heads, segment, width)."""
        return rearrange(x, "r n (h d) -> r h n d", h=self.heads).to(kind)

    def recall(self, view: View, q: Tensor) -> Readout:
        """Give what its own queries found, laid out over the layer's heads."""
        kept: _Kept = view.kept
        heads = q.shape[2]

        def laid(x: Tensor) -> Tensor:
            """(rows, memory's heads, segment, width) -> (rows, heads, segment, width), by channels in order."""
            return rearrange(rearrange(x, "r m n d -> r n (m d)"), "r n (h d) -> r h n d", h=heads)

        if self.share is None:
            return Readout(laid(kept.out))
        share = torch.sigmoid(self.share)[None, :, None, None].expand(1, -1, 1, self.value_dim)
        return Readout(laid(kept.out), gate=laid(share))

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[AssociativeState, Losses]:
        """Keep the matrices."""
        kept: _Kept = view.kept
        losses = {"write_cost": self.cost * kept.strength.mean()} if self.cost and self.training else {}
        return kept.after, losses
