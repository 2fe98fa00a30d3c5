"""An associative memory of fixed size: one matrix per head, written by keys and values and read by queries.

The delta rule removes the old value of a key as its new value is written (Schlag et al. 2021, section 4.2); with decay
it is the gated delta rule (Yang et al. 2024). Tokens are computed in chunks, so results do not depend on segmentation.
With ``DPFPFeatureMap`` and ``decay_gate=None`` it is close to ARMT (Rodkin et al. 2024, section 3), which writes memory
tokens alone: :class:`memtx.memory.rmt.ARMTMemory`. :class:`memtx.memory.infini.InfiniMemory` is Infini-attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_at_least, check_divisible
from memtx.memory.base import ContentAttention, Losses, Memory, Readout, View
from memtx.memory.parts import FeatureMap, Gate, NormalizedFeatureMap, TokenShift, merge_heads, split_heads
from memtx.ops.cpu.linear import Linear
from memtx.ops.delta_rule import gated_delta_rule
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class AssociativeState:
    """The matrices and the last input.

    Attributes:
        matrix: Memory of each head, ``(batch, heads, feature_dim, value_dim)``, float32 or wider so that small writes
            add up.
        last_input: Last layer input of the open document, for the token shift, ``(batch, dim)``.
    """

    matrix: Tensor
    last_input: Tensor


class AssociativeMemory(Memory[AssociativeState]):
    """Fast weights with projections of their own, next to an exact memory.

    Keys, values, queries and gates are made from token-shifted inputs, so that "this came after that" is stored in one
    write.

    Args:
        dim: Width of the hidden states.
        heads: Number of matrices.
        key_dim: Key width per head. Defaults to dim / heads.
        delta_rule: If False, linear attention, whose reads are weighted means if the features are nonnegative.
        feature_map: Factory of the feature map of keys and queries from key_dim.
        write_gate: Factory of the write gate from ``(dim, heads)``; ``ReflectingGate`` without decay tracks ordered
            state.
        decay_gate: Factory of the decay gate from ``(dim, heads)``. None disables decay, which distant recall needs and
            running text does not (scripts/compare_memories.py). The heads' decay rates start between the gate's value
            and a thousandth of it, as in multi-scale retention (Sun et al. 2023, section 2.2), so that some heads
            remember long from the first step on.
        mix_gate: If True, reads replace a learned share per head of the attention output instead of being added.
        write_penalty: Weight of the mean write gate as a loss. Gates left slightly open where nothing needs to be
            learned do no harm at trained lengths but drown the memory in a stream a hundred times longer; a tenth of an
            answer's loss weight closed them (scripts/measure_recall.py).

    Raises:
        MemtxError: dim is not divisible by heads, or a number is out of range.
    """

    gate_parameters = ("mix_gate",)

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
        check_divisible("Choose a divisor for AssociativeMemory's heads.", dim=dim, heads=heads)
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
        # Reads are divided by the sum of their weights.
        self.is_normalized = self.feature_map.is_nonnegative and not delta_rule

    def init_state(self, batch_size: int, *, like: Tensor) -> AssociativeState:
        """Return empty matrices."""
        shape = (batch_size, self.heads, self.feature_map.feature_dim, self.value_dim + self.is_normalized)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return AssociativeState(like.new_zeros(shape, dtype=dtype), like.new_zeros(batch_size, self.dim))

    def read(self, state: AssociativeState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write and read every token in order."""
        shifted = self.token_shift(x, state.last_input, segment)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k = (self.feature_map(split_heads(proj(shifted), self.heads).to(dtype)) for proj in (self.query, self.key))
        v = split_heads(self.value(shifted), self.heads).to(dtype)
        if self.is_normalized:
            v = F.pad(v, (0, 1), value=1.0)
        strength = self.write_gate(shifted).mT.to(dtype)
        log_decay = None
        if self.decay_gate is not None and self.log_decay_rate is not None:
            log_decay = -self.log_decay_rate.to(dtype).exp()[:, None] * self.decay_gate(shifted).mT.to(dtype)
        out, matrix = gated_delta_rule(
            q, k, v, strength, log_decay, state.matrix.to(dtype), segment.position == 0, delta_rule=self.delta_rule
        )
        if self.is_normalized:
            # Reads as zero where nothing was written.
            out = out[..., :-1] / out[..., -1:].clamp(min=torch.finfo(dtype).eps)
        losses: Losses = {}
        if self.write_penalty and self.training:
            losses["write_penalty"] = self.write_penalty * strength.mean()
        return View.readout_only(segment, out, AssociativeState(matrix, TokenShift.last_input(x)), losses)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return the values read by the memory's own queries, split into the layer's heads."""
        out = split_heads(merge_heads(view.context), q.shape[2])
        if self.mix_gate is None:
            return Readout(out)
        gate = torch.sigmoid(self.mix_gate).repeat_interleave(self.value_dim)
        return Readout(out, gate=split_heads(gate[None, None], q.shape[2]))
