"""The slots of Memformer (Wu et al. 2020): vectors read by cross attention and written once an interval of tokens.

Memformer writes once a segment. Here an interval is counted in tokens of the document, so when a write happens is a
function of positions and how a stream is cut does not matter: what of the open interval was read already is carried
with the slots. A write is made of the layer's inputs alone; so a call of many intervals, with documents beginning
anywhere, is computed at once, and only the slots themselves go in order, a small attention an interval.

In any ``interval`` ticks of a row at most one interval ends, so a call of n tokens has room for ceil(n / interval)
versions of the slots, and the queries of one stretch of ``interval`` ticks meet three: the version that the stretch
found, the one written in it, and the initial one where a document is younger than an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.memory.base import ContentAttention, Losses, Memory, Readout, Trace, View
from memtx.memory.gates import Gate
from memtx.memory.recurrent import newest
from memtx.ops.attention.reference import weigh
from memtx.segment import Segment
from memtx.state import state


@state
class SlotState:
    """Slots and the open interval.

    Attributes:
        slots: (rows, count, dim), as the row's document's newest whole interval left them; zero before that.
        hidden: (rows, interval - 1, dim), the newest layer inputs of the document, newest last.
    """

    slots: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Intervals:
    """The intervals that may end in a call, one a stretch of ``interval`` ticks; shared by layers of equal settings.

    Attributes:
        source: (rows * stretches * interval,) int64, where their inputs stand in [cache | segment], rows flattened.
        first: (rows, stretches) bool, which are their document's first, so that they find the initial slots.
        ends: (rows, stretches) bool, which end in the call at all.
        seen: (rows, stretches, 1, ticks, 3) bool, which version a query meets: initial, found, written.
        last: (rows,) int64, which of [found | written in each stretch] is the next state.
        fresh: (rows,) bool, whether there is none.
    """

    source: Tensor
    first: Tensor
    ends: Tensor
    seen: Tensor
    last: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class _Kept:
    versions: Tensor
    written: Tensor
    cache: Tensor
    x: Tensor
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
    ) -> None:
        super().__init__(dim)
        for name, number, least in (("count", count, 1), ("interval", interval, 1), ("cost", cost, 0)):
            if number < least:
                raise MemtxError(f"{name} is {number}.", f"Give at least {least}.")
        if heads < 1 or dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads of the slots do not divide.", "Choose a divisor.")
        self.interval: int = interval
        self.count = count
        self.heads = heads
        self.cost = cost
        self.bias = nn.Parameter(torch.randn(count, dim))
        self.slot_query, self.slot_key, self.slot_value, self.key, self.value, self.read_key, self.read_value = (
            nn.Linear(dim, dim, bias=False) for _ in range(7)
        )
        self.write_gate = write(2 * dim, 1) if write is not None else None

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"count={self.count}, interval={self.interval}, heads={self.heads}, cost={self.cost}"

    def init_state(self, rows: int, *, like: Tensor) -> SlotState:
        """Return no slots yet, and an empty interval."""
        hidden = like.new_zeros(rows, self.interval - 1, self.dim)
        return SlotState(like.new_zeros(rows, self.count, self.dim), hidden)

    def read(self, state: SlotState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write the slots of every interval that ends in the segment."""
        plan = segment.once((SlotMemory, self.interval), lambda: self._plan(segment))
        cache = state.hidden.to(x.dtype)
        source = torch.cat([cache, x], dim=1)
        shape = (x.shape[0], -1, self.interval, self.dim)
        inputs = source.flatten(0, 1).index_select(0, plan.source).view(shape)
        keys, values = self._heads(self.key(inputs)), self._heads(self.value(inputs))
        initial = _normed(self.bias).to(x.dtype)
        slots, versions, written = state.slots.to(x.dtype), [], []
        for first, k, v in zip(plan.first.unbind(1), keys.unbind(1), values.unbind(1), strict=True):
            versions.append(slots)
            slots, gate = self._updated(torch.where(first[:, None, None], initial, slots), k, v)
            written.append(gate)
        versions.append(slots)
        return View.apart(segment, _Kept(torch.stack(versions, 1), torch.stack(written, 1), cache, x, plan))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... n (h d) -> ... h n d", h=self.heads)

    def _updated(self, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return slots after an interval, and their gates (section 3.3, slot attention; 3.4, forgetting).

        Args:
            slots: (rows, count, dim).
            k: (rows, heads, interval, head_dim), the interval's keys; slots attend to them and each to itself.
            v: likewise, values.
        """
        q, own_k, own_v = (self._heads(part(slots)) for part in (self.slot_query, self.slot_key, self.slot_value))
        scores = torch.cat([(q * own_k).sum(-1, keepdim=True), q @ k.mT], dim=-1) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        new = rearrange(weights[..., :1] * own_v + weights[..., 1:] @ v, "r h s d -> r s (h d)")
        # Pulled a little to where it began, then of fixed length: what is not written again fades.
        new = _normed(new + self.bias).to(slots.dtype)
        if self.write_gate is None:
            return new, new.new_ones(*new.shape[:2], 1)
        gate = self.write_gate(torch.cat([slots, new], dim=-1))
        return slots + gate * (new - slots), gate

    def recall(self, view: View, q: Tensor) -> Readout:
        """Attend from the layer's queries to the slots of each one's time."""
        kept: _Kept = view.kept
        rows, n, heads, head_dim = q.shape
        stretches, ticks = kept.plan.seen.shape[1], kept.plan.seen.shape[3]
        initial = _normed(self.bias).to(kept.versions.dtype).expand(rows, stretches, -1, -1)

        def met(part: nn.Linear) -> Tensor:
            """(rows, stretches, heads, 3 count, head_dim)."""
            found = part(kept.versions)
            parts = (part(initial), found[:, :-1], found[:, 1:])
            return rearrange(torch.cat(parts, dim=2), "r b s (h d) -> r b h s d", h=heads)

        asked = F.pad(q, (0, 0, 0, 0, 0, stretches * ticks - n))
        asked = rearrange(asked, "r (b t) h d -> r b h t d", b=stretches)
        scores = (asked @ met(self.read_key).mT) * head_dim**-0.5
        out, lse = weigh(scores, kept.plan.seen.repeat_interleave(self.count, dim=-1), met(self.read_value))
        out = rearrange(out, "r b h t d -> r h (b t) d")[:, :, :n]
        return Readout(out, lse=rearrange(lse, "r b h t -> r h (b t)")[:, :, :n])

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[SlotState, Losses]:
        """Keep the newest slots of the newest document, and its open interval."""
        kept: _Kept = view.kept
        row = torch.arange(kept.x.shape[0], device=kept.x.device)
        slots = kept.versions[row, kept.plan.last].masked_fill(kept.plan.fresh[:, None, None], 0.0)
        losses: Losses = {}
        if self.cost and self.training:
            gates = kept.written.mean((-2, -1)) * kept.plan.ends
            losses["write_cost"] = self.cost * gates.sum() / kept.plan.ends.sum().clamp(min=1)
        return SlotState(slots, newest(kept.cache, kept.x, segment)), losses

    def _plan(self, segment: Segment) -> Intervals:
        interval, n, position = self.interval, segment.length, segment.position
        rows, stretches = position.shape[0], -(-n // interval)
        ticks = min(interval, n)
        device = position.device
        tick = torch.arange(n, device=device)

        def by_stretch(x: Tensor, fill: int) -> Tensor:
            return F.pad(x, (0, stretches * ticks - n), value=fill).view(rows, stretches, ticks)

        ending = by_stretch(((position + 1) % interval == 0).int(), 0)
        at = ending.argmax(-1) + torch.arange(stretches, device=device) * ticks
        at = at.clamp(max=n - 1)
        # An interval that ends at tick i began at tick i - interval + 1: place i of [cache | segment].
        row = torch.arange(rows, device=device)[:, None, None]
        source = row * (interval - 1 + n) + at[..., None] + torch.arange(interval, device=device)
        # The version a query meets was written at the tick before its own interval began.
        written = by_stretch(tick - position % interval - 1, -1)
        young = by_stretch((position < interval).int(), 0).bool()
        begin = torch.arange(stretches, device=device)[:, None] * ticks
        own = ~young & (written >= begin)
        seen = torch.stack([young, ~young & ~own, own], dim=-1)[:, :, None]
        newest_written = n - segment.next_position % interval - 1
        last = torch.where(newest_written < 0, 0, newest_written.clamp(min=0) // interval + 1)
        return Intervals(
            source.flatten(),
            position.gather(1, at) < interval,
            ending.any(-1),
            seen,
            last,
            segment.next_position < interval,
        )


def _normed(x: Tensor) -> Tensor:
    """Return x of mean square 1 along its last axis: of Memformer's length 1 times the root of the width."""
    return F.rms_norm(x, x.shape[-1:])
