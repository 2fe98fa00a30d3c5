"""The slots of Memformer (Wu et al. 2020): vectors read by cross-attention and written once per interval of tokens.

Memformer writes once per segment; here an interval is a number of tokens of the document, so results do not depend on
segmentation. Slots are constant within an interval, so only their attention to the open one so far and its
log-sum-exp are carried. A write uses the layer's inputs alone, so a call of many intervals, with documents starting
anywhere, is computed at once, and only the slots are updated in sequence, with one small attention per interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_divisible, check_positive
from memtx.memory.base import ContentAttention, Losses, Memory, Readout, View
from memtx.memory.intervals import IntervalPlan, attend_by_chunk
from memtx.memory.parts import Gate, TokenShift, merge_heads, split_heads
from memtx.ops.attention.reference import merge_attention, softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class SlotState:
    """The slots and their attention to the open interval.

    Attributes:
        slots: Slots after the last finished interval of the open document, ``(batch, num_slots, dim)``; zero before
            that.
        partial_output: Output of the slots' attention to the open interval, ``(batch, num_slots, dim)``, float32 or
            wider; zero if an interval has just ended.
        partial_lse: Log-sum-exp of that attention, ``(batch, num_slots, heads)``, same dtype; zero in the same case.
        last_input: Last layer input, for the token shift, ``(batch, dim)``; ``(batch, 0)`` without one.
    """

    slots: Tensor
    partial_output: Tensor
    partial_lse: Tensor
    last_input: Tensor


@dataclass(frozen=True)
class _ReadContext:
    versions: Tensor
    plan: IntervalPlan


class SlotMemory(Memory[SlotState]):
    """Slots next to an exact memory.

    Args:
        dim: Width of the hidden states.
        num_slots: Number of slots.
        interval: Tokens of a document between two writes.
        heads: Heads of the writing attention.
        write_gate: Factory of a slot's write gate from (2 * dim, 1); its input is the old and the new slot. None always
            takes the new slot, as Memformer does; such slots forget soon after the trained length.
        write_penalty: Weight of the mean write gate as a loss.
        token_shift: If True, slots see each token mixed with the previous one; Memformer does not.
        temperature: Temperature of the writing attention; below 1, a slot takes few tokens (Memformer's section 3). At
            0.1 slots learn to separate pairs that they mix up at 0.25 and 1; at 0.05 that takes longer.

    Raises:
        MemtxError: A number is out of range, dim is not divisible by heads, or the write gate exceeds 1.
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
        check_divisible("Choose a divisor for SlotMemory's heads.", dim=dim, heads=heads)
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
                f"write_gate is a {type(self.write_gate).__name__}, which goes up to {self.write_gate.max_value:g}, "
                "but slots interpolate between old and new.",
                "Use memtx.memory.parts.Gate.",
            )
        self.token_shift = TokenShift(dim) if token_shift else None

    def init_state(self, batch_size: int, *, like: Tensor) -> SlotState:
        """Return zeros: no slots written and an empty interval."""
        slots = like.new_zeros(batch_size, self.num_slots, self.dim)
        dtype = torch.promote_types(like.dtype, torch.float32)
        lse = slots.new_zeros(batch_size, self.num_slots, self.heads, dtype=dtype)
        last_input = like.new_zeros(batch_size, self.dim if self.token_shift is not None else 0)
        return SlotState(slots, slots.to(dtype), lse, last_input)

    def read(self, state: SlotState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write the slots of every interval that ends in the segment."""
        plan = segment.memo((SlotMemory, self.interval), lambda: IntervalPlan.from_segment(segment, self.interval))
        shifted = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
        keys, values = self.key(shifted), self.value(shifted)
        partial = split_heads(state.partial_output.to(x.dtype), self.heads), state.partial_lse.mT.to(x.dtype)
        initial = _rms_norm(self.slot_bias).to(x.dtype)

        slots = state.slots.to(x.dtype)
        versions, gates = [slots], []
        k_by_interval, v_by_interval = self._split_intervals(keys, plan), self._split_intervals(values, plan)
        intervals = zip(plan.is_first.unbind(1), k_by_interval, v_by_interval, plan.input_mask.unbind(1), strict=True)
        for number, (is_first, k, v, mask) in enumerate(intervals):
            slots = torch.where(is_first[:, None, None], initial, slots)
            past = partial if number == 0 else None
            attended = self._attend_interval(slots, k, v, mask, past, plan.first_continues)
            slots, gate = self._update_slots(slots, attended)
            versions.append(slots)
            gates.append(gate)
        stacked = torch.stack(versions, dim=1)

        last = stacked[torch.arange(x.shape[0], device=x.device), plan.final_version]
        is_unwritten, open_is_empty = plan.is_unwritten[:, None, None], plan.open_is_empty[:, None, None]
        chunk_length = plan.open_mask.shape[-1]
        k, v = (split_heads(tensor[:, x.shape[1] - chunk_length :], self.heads) for tensor in (keys, values))
        open_slots = torch.where(is_unwritten, initial, last)
        out, lse = self._attend_interval(open_slots, k, v, plan.open_mask, partial, plan.open_continues)
        dtype = torch.promote_types(x.dtype, torch.float32)
        next_state = SlotState(
            last.masked_fill(is_unwritten, 0.0),
            merge_heads(out).to(dtype).masked_fill(open_is_empty, 0.0),
            lse.mT.to(dtype).masked_fill(open_is_empty, 0.0),
            TokenShift.last_input(x) if self.token_shift is not None else state.last_input,
        )
        losses: Losses = {}
        if self.write_penalty and self.training:
            mean_gates = torch.stack(gates, dim=1).mean((-2, -1)) * plan.has_end
            losses["write_penalty"] = self.write_penalty * mean_gates.sum() / plan.has_end.sum().clamp(min=1)
        return View.readout_only(segment, _ReadContext(stacked, plan), next_state, losses)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend from the layer's queries to the slots at each query's position."""
        context: _ReadContext = view.context
        mask, versions = context.plan.version_mask, context.versions
        initial = _rms_norm(self.slot_bias).to(versions.dtype).expand(q.shape[0], mask.shape[1], -1, -1)

        def visible(proj: nn.Linear) -> Tensor:
            """Return ``(batch, chunks, heads, 3 * num_slots, head_dim)``."""
            written = proj(versions)
            return split_heads(torch.cat([proj(initial), written[:, :-1], written[:, 1:]], dim=2), q.shape[2])

        mask = mask.repeat_interleave(self.num_slots, dim=-1)
        return attend_by_chunk(q, visible(self.read_key), visible(self.read_value), mask)

    def _split_intervals(self, x: Tensor, plan: IntervalPlan) -> tuple[Tensor, ...]:
        """Return each interval's part of x ``(batch, length, dim)``, ``(batch, heads, chunk_length, head_dim)``."""
        inputs = x.flatten(0, 1).index_select(0, plan.input_indices)
        return split_heads(inputs.view(x.shape[0], -1, plan.open_mask.shape[-1], self.dim), self.heads).unbind(1)

    def _attend_interval(
        self, slots: Tensor, k: Tensor, v: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None, continues: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the output and log-sum-exp of the slots' attention to an interval, including tokens before the call.

        Args:
            slots: Slots, ``(batch, num_slots, dim)``.
            k: Keys, ``(batch, heads, chunk_length, head_dim)``.
            v: Values, ``(batch, heads, chunk_length, head_dim)``.
            mask: Tokens that belong to the interval, ``(batch, 1, 1, chunk_length)`` bool.
            past: Output and log-sum-exp over the tokens before the call.
            continues: Streams whose interval includes those tokens, ``(batch,)`` bool.
        """
        q = split_heads(self.slot_query(slots), self.heads)
        attended = softmax_attention(q @ k.mT * self.scale, mask, v)
        if past is None:
            return attended
        past_output, past_lse = past
        return merge_attention([attended, (past_output, past_lse.masked_fill(~continues[:, None, None], -torch.inf))])

    def _update_slots(self, slots: Tensor, attended: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the slots after an interval and their gates: slot attention, then forgetting (Memformer, section 3).

        Each slot attends to the interval, which ``attended`` is the output and log-sum-exp of, and to itself.
        """
        q, k, v = (split_heads(proj(slots), self.heads) for proj in (self.slot_query, self.slot_key, self.slot_value))
        self_scores = (q * k).sum(-1) * self.scale
        out, _ = merge_attention([(v, self_scores), attended])
        # The bias pulls slots back to their initial values and the norm fixes their length: unwritten content fades.
        new = _rms_norm(merge_heads(out) + self.slot_bias).to(slots.dtype)
        if self.write_gate is None:
            return new, new.new_ones(*new.shape[:2], 1)
        gate = self.write_gate(torch.cat([slots, new], dim=-1))
        return slots + gate * (new - slots), gate


def _rms_norm(x: Tensor) -> Tensor:
    """Normalize x to a mean square of 1: Memformer's length 1 times the square root of the width."""
    return F.rms_norm(x, x.shape[-1:])
