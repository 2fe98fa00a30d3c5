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

from memtx.errors import MemtxError, at_least, positive
from memtx.memory.base import ContentAttention, Losses, Memory, Readout, Trace, View
from memtx.memory.gates import Gate
from memtx.memory.intervals import Intervals, recalled
from memtx.memory.shift import TokenShift
from memtx.ops.attention.merge import merge
from memtx.ops.attention.reference import weigh
from memtx.ops.linear import Linear
from memtx.segment import Segment
from memtx.state import state

NOTHING = float("-inf")


@state
class SlotState:
    """Slots and what they took up of the open interval.

    Attributes:
        slots: (rows, count, dim), as the row's document's newest whole interval left them; zero before that.
        taken: (rows, count, dim), what the slots' attention over the open interval gives so far, float32 at least.
        lse: (rows, count, heads), its log-sum-exp, likewise; both zero where an interval has just ended.
        last: (rows, dim), the newest layer input, for the token shift; (rows, 0) where there is none.
    """

    slots: Tensor
    taken: Tensor
    lse: Tensor
    last: Tensor


@dataclass(frozen=True)
class _Kept:
    versions: Tensor
    written: Tensor
    after: SlotState
    plan: Intervals


class SlotMemory(Memory[SlotState]):
    """Slots beside an exact memory.

    Args:
        dim: width of the hidden states.
        count: slots.
        interval: tokens of a document after which they are written once.
        heads: of the writing attention.
        write: makes the write gate of a slot from (2 dim, 1), which sees the old and the new; None for Memformer's
            writing, which always takes the new. Without a gate slots forget soon after the trained length.
        cost: weight of the mean write gate as a loss, a price on writing.
        shift: whether slots see of each token a share of the one before it; Memformer's do not.
        temperature: of the writing attention; below 1 a slot takes few tokens (Memformer's section 3). At 0.1 slots
            learn to tell pairs apart that they mix up at 0.25 and 1, and at 0.05 it takes longer.

    Raises:
        MemtxError: a number is out of range, or heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        count: int = 16,
        interval: int = 128,
        heads: int = 4,
        write: Callable[[int, int], Gate] | None = Gate,
        cost: float = 0.0,
        shift: bool = True,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(dim)
        at_least(1, count=count, interval=interval)
        at_least(0, cost=cost)
        positive(temperature=temperature)
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the slots do not divide.", "Choose a divisor.")
        self.interval: int = interval
        self.count = count
        self.heads = heads
        self.temperature = temperature
        self.scale = (dim // heads) ** -0.5 / temperature
        self.cost = cost
        self.bias = nn.Parameter(torch.randn(count, dim))
        self.slot_query, self.slot_key, self.slot_value, self.key, self.value, self.read_key, self.read_value = (
            Linear(dim, dim, bias=False) for _ in range(7)
        )
        self.write_gate = write(2 * dim, 1) if write is not None else None
        if self.write_gate is not None and self.write_gate.highest > 1:
            raise MemtxError(
                f"The write gate of slots is a {type(self.write_gate).__name__}, which goes up to 2.",
                "Slots are mixed from old and new by shares: give memtx.memory.gates.Gate.",
            )
        self.shift = TokenShift(dim) if shift else None

    def extra_repr(self) -> str:
        """Say the settings."""
        sizes = f"count={self.count}, interval={self.interval}, heads={self.heads}"
        return f"{sizes}, cost={self.cost}, temperature={self.temperature}"

    def init_state(self, rows: int, *, like: Tensor) -> SlotState:
        """Return no slots yet, and nothing taken up."""
        slots = like.new_zeros(rows, self.count, self.dim)
        kind = torch.promote_types(like.dtype, torch.float32)
        lse = slots.new_zeros(rows, self.count, self.heads, dtype=kind)
        return SlotState(slots, slots.to(kind), lse, like.new_zeros(rows, self.dim if self.shift is not None else 0))

    def read(self, state: SlotState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write the slots of every interval that ends in the segment."""
        plan = segment.once((SlotMemory, self.interval), lambda: Intervals.of(segment, self.interval))
        rows, n = x.shape[:2]
        ticks = plan.open.shape[-1]
        mixed = self.shift(x, state.last, segment) if self.shift is not None else x
        keys, values = self.key(mixed), self.value(mixed)

        def by_interval(inputs: Tensor) -> tuple[Tensor, ...]:
            found = inputs.flatten(0, 1).index_select(0, plan.source).view(rows, -1, ticks, self.dim)
            return self._heads(found).unbind(1)

        initial = _normed(self.bias).to(x.dtype)
        slots = state.slots.to(x.dtype)
        before = self._heads(state.taken.to(x.dtype)), state.lse.transpose(1, 2).to(x.dtype)
        versions, written = [slots], []
        intervals = zip(
            plan.first.unbind(1), by_interval(keys), by_interval(values), plan.inside.unbind(1), strict=True
        )
        for number, (first, k, v, inside) in enumerate(intervals):
            found = torch.where(first[:, None, None], initial, slots)
            taken = self._taken(found, k, v, inside, before if number == 0 else None, plan.begun)
            slots, gate = self._updated(found, taken)
            versions.append(slots)
            written.append(gate)
        stacked = torch.stack(versions, dim=1)
        last = stacked[torch.arange(rows, device=x.device), plan.last]
        found = torch.where(plan.fresh[:, None, None], initial, last)
        k, v = (self._heads(part[:, n - ticks :]) for part in (keys, values))
        out, lse = self._taken(found, k, v, plan.open, before, plan.still)
        kind = torch.promote_types(x.dtype, torch.float32)
        after = SlotState(
            last.masked_fill(plan.fresh[:, None, None], 0.0),
            rearrange(out, "r h s d -> r s (h d)").to(kind).masked_fill(plan.empty[:, None, None], 0.0),
            lse.transpose(1, 2).to(kind).masked_fill(plan.empty[:, None, None], 0.0),
            TokenShift.last(x) if self.shift is not None else state.last,
        )
        return View.apart(segment, _Kept(stacked, torch.stack(written, 1), after, plan))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (h d) -> ... h n d", h=self.heads)

    def _taken(
        self,
        slots: Tensor,
        k: Tensor,
        v: Tensor,
        inside: Tensor,
        before: tuple[Tensor, Tensor] | None,
        begun: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return slots' attention over an interval's tokens and its log-sum-exp, what came before the call included.

        Args:
            slots: (rows, count, dim).
            k: (rows, heads, ticks, head_dim).
            v: likewise.
            inside: (rows, 1, 1, ticks) bool, which tokens are of the interval.
            before: output and log-sum-exp of the tokens before the call.
            begun: (rows,) bool, whether these count.
        """
        q = self._heads(self.slot_query(slots))
        found = weigh(q @ k.mT * self.scale, inside, v)
        if before is None:
            return found
        return merge([found, (before[0], before[1].masked_fill(~begun[:, None, None], NOTHING))])

    def _updated(self, slots: Tensor, taken: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return slots after an interval, and their gates: slot attention, then forgetting (Memformer's section 3).

        Args:
            slots: (rows, count, dim); each attends to the interval and to itself.
            taken: output and log-sum-exp of its attention to the interval.
        """
        q, k, v = (self._heads(part(slots)) for part in (self.slot_query, self.slot_key, self.slot_value))
        own = (q * k).sum(-1) * self.scale
        out, _ = merge([(v, own), taken])
        # Pulled a little to where it began, then of fixed length: what is not written again fades.
        new = _normed(rearrange(out, "r h s d -> r s (h d)") + self.bias).to(slots.dtype)
        if self.write_gate is None:
            return new, new.new_ones(*new.shape[:2], 1)
        gate = self.write_gate(torch.cat([slots, new], dim=-1))
        return slots + gate * (new - slots), gate

    def recall(self, view: View, q: Tensor) -> Readout:
        """Attend from the layer's queries to the slots of each one's time."""
        kept: _Kept = view.kept
        seen = kept.plan.seen
        initial = _normed(self.bias).to(kept.versions.dtype).expand(q.shape[0], seen.shape[1], -1, -1)

        def met(part: nn.Linear) -> Tensor:
            """(rows, stretches, heads, 3 count, head_dim)."""
            found = part(kept.versions)
            parts = (part(initial), found[:, :-1], found[:, 1:])
            return rearrange(torch.cat(parts, dim=2), "r b s (h d) -> r b h s d", h=q.shape[2])

        return recalled(q, met(self.read_key), met(self.read_value), seen.repeat_interleave(self.count, dim=-1))

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[SlotState, Losses]:
        """Keep the newest slots of the newest document, and what they took up of its open interval."""
        kept: _Kept = view.kept
        losses: Losses = {}
        if self.cost and self.training:
            gates = kept.written.mean((-2, -1)) * kept.plan.ends
            losses["write_cost"] = self.cost * gates.sum() / kept.plan.ends.sum().clamp(min=1)
        return kept.after, losses


def _normed(x: Tensor) -> Tensor:
    """Return x of mean square 1 along its last axis: of Memformer's length 1 times the root of the width."""
    return F.rms_norm(x, x.shape[-1:])
