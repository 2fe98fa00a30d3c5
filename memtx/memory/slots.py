"""The slots of Memformer (Wu et al. 2020): vectors read by cross attention and written once an interval of tokens.

Memformer writes once a segment. Here an interval is counted in tokens of the document, so when a write happens is a
function of positions and how a stream is cut does not matter. Slots do not change within an interval, so what they
attend to in it is taken up as it comes: of an open interval only their attention so far is carried, with its
log-sum-exp. A write is made of the layer's inputs alone; so a call of many intervals, with documents beginning
anywhere, is computed at once, and only the slots themselves go in order, a small attention an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_positive
from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.memory.gates import Gate
from memtx.memory.intervals import IntervalPlan, attend_by_chunk
from memtx.memory.shift import TokenShift
from memtx.ops.attention.reference import merge_attention, softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment
from memtx.state import state_dataclass

NEG_INF = float("-inf")


@state_dataclass
class SlotState:
    """Slots and what they took up of the open interval.

    Attributes:
        slots: (rows, num_slots, dim), as the row's document's newest whole interval left them; zero before that.
        partial_output: (rows, num_slots, dim), what the slots' attention over the open interval gives so far, float32
            at least.
        partial_lse: (rows, num_slots, heads), its log-sum-exp, likewise; both zero where an interval has just ended.
        last_input: (rows, dim), the newest layer input, for the token shift; (rows, 0) where there is none.
    """

    slots: Tensor
    partial_output: Tensor
    partial_lse: Tensor
    last_input: Tensor


@dataclass(frozen=True)
class _ReadContext:
    versions: Tensor
    gates: Tensor
    next_state: SlotState
    plan: IntervalPlan


class SlotMemory(Memory[SlotState]):
    """Slots beside an exact memory.

    Args:
        dim: width of the hidden states.
        num_slots: slots.
        interval: tokens of a document after which they are written once.
        heads: of the writing attention.
        write_gate: makes the write gate of a slot from (2 dim, 1), which sees the old and the new; None for Memformer's
            writing, which always takes the new. Without a gate slots forget soon after the trained length.
        write_penalty: weight of the mean write gate as a loss, a price on writing.
        token_shift: whether slots see of each token a share of the one before it; Memformer's do not.
        temperature: of the writing attention; below 1 a slot takes few tokens (Memformer's section 3). At 0.1 slots
            learn to tell pairs apart that they mix up at 0.25 and 1, and at 0.05 it takes longer.

    Raises:
        MemtxError: a number is out of range, or heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int = 16,
        interval: int = 128,
        heads: int = 4,
        write_gate: Callable[[int, int], Gate] | None = Gate,
        write_penalty: float = 0.0,
        token_shift: bool = True,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(dim)
        check_at_least(1, num_slots=num_slots, interval=interval)
        check_at_least(0, write_penalty=write_penalty)
        check_positive(temperature=temperature)
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the slots do not divide.", "Choose a divisor.")
        self.interval: int = interval
        self.num_slots = num_slots
        self.heads = heads
        self.temperature = temperature
        self.scale = (dim // heads) ** -0.5 / temperature
        self.write_penalty = write_penalty
        self.slot_bias = nn.Parameter(torch.randn(num_slots, dim))
        self.slot_query, self.slot_key, self.slot_value, self.key, self.value, self.read_key, self.read_value = (
            Linear(dim, dim, bias=False) for _ in range(7)
        )
        self.write_gate = write_gate(2 * dim, 1) if write_gate is not None else None
        if self.write_gate is not None and self.write_gate.max_value > 1:
            raise MemtxError(
                f"The write gate of slots is a {type(self.write_gate).__name__}, which goes up to 2.",
                "Slots are mixed from old and new by shares: give memtx.memory.gates.Gate.",
            )
        self.token_shift = TokenShift(dim) if token_shift else None

    def extra_repr(self) -> str:
        """Say the settings."""
        sizes = f"num_slots={self.num_slots}, interval={self.interval}, heads={self.heads}"
        return f"{sizes}, write_penalty={self.write_penalty}, temperature={self.temperature}"

    def init_state(self, batch_size: int, *, like: Tensor) -> SlotState:
        """Return no slots yet, and nothing taken up."""
        slots = like.new_zeros(batch_size, self.num_slots, self.dim)
        kind = torch.promote_types(like.dtype, torch.float32)
        lse = slots.new_zeros(batch_size, self.num_slots, self.heads, dtype=kind)
        return SlotState(
            slots, slots.to(kind), lse, like.new_zeros(batch_size, self.dim if self.token_shift is not None else 0)
        )

    def read(self, state: SlotState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write the slots of every interval that ends in the segment."""
        plan = segment.memo((SlotMemory, self.interval), lambda: IntervalPlan.from_segment(segment, self.interval))
        rows, n = x.shape[:2]
        ticks = plan.open_mask.shape[-1]
        mixed = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
        keys, values = self.key(mixed), self.value(mixed)

        def by_interval(inputs: Tensor) -> tuple[Tensor, ...]:
            found = inputs.flatten(0, 1).index_select(0, plan.input_indices).view(rows, -1, ticks, self.dim)
            return self._split_heads(found).unbind(1)

        initial = _rms_norm(self.slot_bias).to(x.dtype)
        slots = state.slots.to(x.dtype)
        before = self._split_heads(state.partial_output.to(x.dtype)), state.partial_lse.transpose(1, 2).to(x.dtype)
        versions, written = [slots], []
        intervals = zip(
            plan.is_first.unbind(1), by_interval(keys), by_interval(values), plan.input_mask.unbind(1), strict=True
        )
        for number, (first, k, v, inside) in enumerate(intervals):
            found = torch.where(first[:, None, None], initial, slots)
            taken = self._attend_interval(found, k, v, inside, before if number == 0 else None, plan.first_continues)
            slots, gate = self._update_slots(found, taken)
            versions.append(slots)
            written.append(gate)
        stacked = torch.stack(versions, dim=1)
        last = stacked[torch.arange(rows, device=x.device), plan.final_version]
        found = torch.where(plan.is_unwritten[:, None, None], initial, last)
        k, v = (self._split_heads(part[:, n - ticks :]) for part in (keys, values))
        out, lse = self._attend_interval(found, k, v, plan.open_mask, before, plan.open_continues)
        kind = torch.promote_types(x.dtype, torch.float32)
        after = SlotState(
            last.masked_fill(plan.is_unwritten[:, None, None], 0.0),
            rearrange(out, "r h s d -> r s (h d)").to(kind).masked_fill(plan.open_is_empty[:, None, None], 0.0),
            lse.transpose(1, 2).to(kind).masked_fill(plan.open_is_empty[:, None, None], 0.0),
            TokenShift.last_input(x) if self.token_shift is not None else state.last_input,
        )
        return View.readout_only(segment, _ReadContext(stacked, torch.stack(written, 1), after, plan))

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (h d) -> ... h n d", h=self.heads)

    def _attend_interval(
        self,
        slots: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None,
        continues: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return slots' attention over an interval's tokens and its log-sum-exp, what came before the call included.

        Args:
            slots: (rows, num_slots, dim).
            k: (rows, heads, ticks, head_dim).
            v: likewise.
            mask: (rows, 1, 1, ticks) bool, which tokens are of the interval.
            past: output and log-sum-exp of the tokens before the call.
            continues: (rows,) bool, whether these count.
        """
        q = self._split_heads(self.slot_query(slots))
        found = softmax_attention(q @ k.mT * self.scale, mask, v)
        if past is None:
            return found
        return merge_attention([found, (past[0], past[1].masked_fill(~continues[:, None, None], NEG_INF))])

    def _update_slots(self, slots: Tensor, attended: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return slots after an interval, and their gates: slot attention, then forgetting (Memformer's section 3).

        Args:
            slots: (rows, num_slots, dim); each attends to the interval and to itself.
            attended: output and log-sum-exp of its attention to the interval.
        """
        q, k, v = (self._split_heads(part(slots)) for part in (self.slot_query, self.slot_key, self.slot_value))
        own = (q * k).sum(-1) * self.scale
        out, _ = merge_attention([(v, own), attended])
        # Pulled a little to where it began, then of fixed length: what is not written again fades.
        new = _rms_norm(rearrange(out, "r h s d -> r s (h d)") + self.slot_bias).to(slots.dtype)
        if self.write_gate is None:
            return new, new.new_ones(*new.shape[:2], 1)
        gate = self.write_gate(torch.cat([slots, new], dim=-1))
        return slots + gate * (new - slots), gate

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend from the layer's queries to the slots of each one's time."""
        kept: _ReadContext = view.context
        seen = kept.plan.version_mask
        initial = _rms_norm(self.slot_bias).to(kept.versions.dtype).expand(q.shape[0], seen.shape[1], -1, -1)

        def met(part: nn.Linear) -> Tensor:
            """(rows, stretches, heads, 3 num_slots, head_dim)."""
            found = part(kept.versions)
            parts = (part(initial), found[:, :-1], found[:, 1:])
            return rearrange(torch.cat(parts, dim=2), "r b s (h d) -> r b h s d", h=q.shape[2])

        return attend_by_chunk(
            q, met(self.read_key), met(self.read_value), seen.repeat_interleave(self.num_slots, dim=-1)
        )

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[SlotState, Losses]:
        """Keep the newest slots of the newest document, and what they took up of its open interval."""
        kept: _ReadContext = view.context
        losses: Losses = {}
        if self.write_penalty and self.training:
            gates = kept.gates.mean((-2, -1)) * kept.plan.has_end
            losses["write_penalty"] = self.write_penalty * gates.sum() / kept.plan.has_end.sum().clamp(min=1)
        return kept.next_state, losses


def _rms_norm(x: Tensor) -> Tensor:
    """Return x of mean square 1 along its last axis: of Memformer's length 1 times the root of the width."""
    return F.rms_norm(x, x.shape[-1:])
