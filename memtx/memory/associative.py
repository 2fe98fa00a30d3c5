"""An associative memory of fixed size: a matrix a head that keys write values into and queries read them from.

By the delta rule what a key held is taken out as its new value goes in (Schlag et al. 2021, section 4.2), with decay
it is the gated delta rule (Yang et al. 2024). Both are recurrences over tokens, computed by chunks, so how a stream
is cut does not matter. Settings lead to published memories, with ``decay_gate=None``:

- Infini-attention (Munkhdalai et al. 2024, section 3.1): ``feature_map=EluFeatureMap, mix_gate=True``,
  ``delta_rule`` for its delta variant. There the memory is written once a segment; here at every token, as if
  segments had one.
- ARMT (Rodkin et al. 2024, section 3): ``feature_map=DPFPFeatureMap``, there written by memory tokens alone, here by
  all that the write gate lets through.
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
from memtx.memory.features import FeatureMap, NormalizedFeatureMap
from memtx.memory.gates import Gate
from memtx.memory.shift import TokenShift
from memtx.ops.cpu.linear import Linear
from memtx.ops.delta_rule import chunk_gated_delta_rule
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class AssociativeState:
    """The matrices.

    Attributes:
        matrix: (rows, heads, feature width, value width), float32 at least: small writes must add up.
        last_input: (rows, dim), the newest layer input of the row's document, for the token shift.
    """

    matrix: Tensor
    last_input: Tensor


@dataclass(frozen=True)
class _ReadContext:
    out: Tensor
    write_strength: Tensor
    next_state: AssociativeState


class AssociativeMemory(Memory[AssociativeState]):
    """Fast weights beside an exact memory, with projections of their own.

    A token of the document so far is stored with the one before it in view: keys, values, queries and gates are made
    of inputs shifted by one token in part, so that "what came after this" can be stored at once.

    Args:
        dim: width of the hidden states.
        heads: matrices.
        key_dim: width of a head's keys; dim / heads by default.
        delta_rule: the delta rule; False for linear attention, whose reads are means where the feature is positive.
        feature_map: makes the feature map of keys and queries from key_dim.
        write_gate: makes the write gate from (dim, heads); ``ReflectingGate`` for what must be kept track of in order,
            beside no decay.
        decay_gate: makes the gate of forgetting from (dim, heads); None for keeping all, which what is asked for from
            far away needs and running text does not (scripts/compare_memories.py). Heads begin to forget at rates from
            what the gate says down to a thousandth of it, as retention does at several scales (Sun et al. 2023, section
            2.2), so that some keep long from the first step on.
        mix_gate: False: what is read is added to the attention. True: by a learned share a head that attention loses.
        write_penalty: weight of the mean write gate as a loss, a price on writing. Gates that are open a little
            wherever nothing is to be learned do no harm at the trained lengths and drown the memory in a stream a
            hundred times longer: a tenth of what an answer weighs closed them (scripts/measure_recall.py).

    Raises:
        MemtxError: numbers do not divide as they must, or are out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        key_dim: int | None = None,
        delta_rule: bool = True,
        feature_map: Callable[[int], FeatureMap] = NormalizedFeatureMap,
        write_gate: Callable[[int, int], Gate] = Gate,
        decay_gate: Callable[[int, int], Gate] | None = Gate,
        mix_gate: bool = False,
        write_penalty: float = 0.0,
    ) -> None:
        super().__init__(dim)
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the memory do not divide.", "Choose a divisor.")
        key_dim = key_dim if key_dim is not None else dim // heads
        check_at_least(1, key_dim=key_dim)
        check_at_least(0, write_penalty=write_penalty)
        self.heads = heads
        self.value_dim = dim // heads
        self.delta_rule = delta_rule
        self.write_penalty = write_penalty
        self.feature_map = feature_map(key_dim)
        self.query = Linear(dim, heads * key_dim, bias=False)
        self.key = Linear(dim, heads * key_dim, bias=False)
        self.value = Linear(dim, dim, bias=False)
        self.write_gate = write_gate(dim, heads)
        self.decay_gate = decay_gate(dim, heads) if decay_gate is not None else None
        self.token_shift = TokenShift(dim)
        slowest = -math.log(1000.0)
        self.log_decay_rate = nn.Parameter(torch.linspace(0.0, slowest, heads)) if decay_gate is not None else None
        self.mix_gate = nn.Parameter(torch.zeros(heads)) if mix_gate else None

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"heads={self.heads}, delta_rule={self.delta_rule}, write_penalty={self.write_penalty}"

    @property
    def is_normalized(self) -> bool:
        """Whether a read is divided by the weights that it was summed with."""
        return self.feature_map.is_nonnegative and not self.delta_rule

    def init_state(self, batch_size: int, *, like: Tensor) -> AssociativeState:
        """Return empty matrices."""
        shape = (batch_size, self.heads, self.feature_map.feature_dim, self.value_dim + self.is_normalized)
        kind = torch.promote_types(like.dtype, torch.float32)
        return AssociativeState(like.new_zeros(shape, dtype=kind), like.new_zeros(batch_size, self.dim))

    def read(self, state: AssociativeState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write and read every token in order."""
        mixed = self.token_shift(x, state.last_input, segment)
        kind = torch.promote_types(x.dtype, torch.float32)
        q, k = (self.feature_map(self._split_heads(part(mixed), kind)) for part in (self.query, self.key))
        v = self._split_heads(self.value(mixed), kind)
        if self.is_normalized:
            v = F.pad(v, (0, 1), value=1.0)
        strength = self._split_heads(self.write_gate(mixed), kind)[..., 0]
        log_decay = None
        if self.decay_gate is not None and self.log_decay_rate is not None:
            forgets = self._split_heads(self.decay_gate(mixed), kind)[..., 0]
            log_decay = -self.log_decay_rate.to(kind).exp()[:, None] * forgets
        starts = segment.position == 0
        out, matrix = chunk_gated_delta_rule(
            q, k, v, strength, log_decay, state.matrix.to(kind), starts, delta_rule=self.delta_rule
        )
        if self.is_normalized:
            # Nothing was written: nothing is read.
            out = out[..., :-1] / out[..., -1:].clamp(min=torch.finfo(kind).eps)
        return View.readout_only(
            segment, _ReadContext(out, strength, AssociativeState(matrix, TokenShift.last_input(x)))
        )

    def _split_heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, segment, heads * width) -> (rows, heads, segment, width)."""
        return rearrange(x, "r n (h d) -> r h n d", h=self.heads).to(dtype)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Give what its own queries found, laid out over the layer's heads."""
        kept: _ReadContext = view.context
        heads = q.shape[2]

        def laid(x: Tensor) -> Tensor:
            """(rows, memory's heads, segment, width) -> (rows, heads, segment, width), by channels in order."""
            return rearrange(rearrange(x, "r m n d -> r n (m d)"), "r n (h d) -> r h n d", h=heads)

        if self.mix_gate is None:
            return Readout(laid(kept.out))
        share = torch.sigmoid(self.mix_gate)[None, :, None, None].expand(1, -1, 1, self.value_dim)
        return Readout(laid(kept.out), gate=laid(share))

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[AssociativeState, Losses]:
        """Keep the matrices."""
        kept: _ReadContext = view.context
        losses = (
            {"write_penalty": self.write_penalty * kept.write_strength.mean()}
            if self.write_penalty and self.training
            else {}
        )
        return kept.next_state, losses
