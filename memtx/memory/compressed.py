"""The compressed memory of the Compressive Transformer (Rae et al. 2020) behind one edge.

A position sees the newest states exactly and, through one entry a block of ``rate`` positions, ``length``
blocks before them. The edge between the two is a function of the position, aligned to blocks:
edge(t) = rate * max(0, floor((t - window + 1) / rate)). A past token is thus either exact or in exactly one
entry. A block is compressed when it crosses the edge, inside the segment whose later queries read it, so
the compression learns from the language model itself, even with a horizon of one segment.

Shapes are fixed: of any ``rate`` ticks of a row at most one gives birth to a block, so a segment of n tokens
has room for ceil(n / rate) of them; the surplus is born expired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from memtx.errors import at_least
from memtx.memory.base import ContentAttention, Losses, Memory, Places, Trace, View
from memtx.memory.compression import Compression, StridedConvolution
from memtx.memory.reconstruction import Reconstruction
from memtx.memory.recurrent import cached_places, newest
from memtx.memory.ring import Layout
from memtx.ops.visibility import Section, Visibility
from memtx.segment import FAR, Segment
from memtx.state import state


@state
class CompressedState:
    """Cache and bank.

    Attributes:
        hidden: (rows, window + rate - 1, dim), exact layer inputs of the row's document, newest last.
        bank: (rows, length, dim), the newest compressed entries, newest last.
    """

    hidden: Tensor
    bank: Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks that may be compressed in a segment; shared by all layers of equal settings.

    Attributes:
        source: (rows * blocks * rate,) int64, where their states stand in the cache, or in [cache | segment] where
            the segment is longer than the window; rows flattened.
        probe: likewise in [cache | segment] the newest states as each block crosses.
        born: (rows, blocks) bool, which really cross the edge in this segment.
        kept: (rows, length) int64, which entries of [bank | blocks] are the next bank.
        alive: (rows, length, 1) bool, which places of the next bank are taken.
        places: of [bank | blocks | cache | segment].
    """

    source: Tensor
    probe: Tensor
    born: Tensor
    kept: Tensor
    alive: Tensor
    places: Places


@dataclass(frozen=True)
class _Kept:
    blocks: Tensor
    usage: Tensor | None
    plan: Blocks


class CompressedMemory(Memory[CompressedState]):
    """An exact window and a bank of compressed entries.

    Args:
        dim: width of the hidden states.
        window: exact positions seen at least (up to window + rate - 1, as the edge moves by blocks).
        rate: positions a compressed entry stands for.
        length: compressed entries kept.
        compression: makes the compression from (dim, rate).
        reconstruction: makes an auxiliary loss from (dim, rate); None for none.
        per_call: False: what a position sees depends on its position alone. True: the published schedule, in
            which all that a call finds in cache and bank is seen by the whole call and blocks are compressed
            after it; results then depend on how a stream is cut.

    Raises:
        MemtxError: a number is out of range.
    """

    beyond = True

    def __init__(
        self,
        dim: int,
        window: int = 512,
        rate: int = 4,
        length: int = 128,
        compression: Callable[[int, int], Compression] = StridedConvolution,
        reconstruction: Callable[[int, int], Reconstruction] | None = None,
        per_call: bool = False,
    ) -> None:
        super().__init__(dim)
        at_least(1, window=window, rate=rate)
        at_least(0, length=length)
        self.window = window
        self.rate = rate
        self.length = length
        self.per_call = per_call
        self.compression = compression(dim, rate)
        self.reconstruction = reconstruction(dim, rate) if reconstruction is not None else None

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"window={self.window}, rate={self.rate}, length={self.length}, per_call={self.per_call}"

    @property
    def cached(self) -> int:
        """Places of the cache."""
        return self.window + self.rate - 1

    def init_state(self, rows: int, *, like: Tensor) -> CompressedState:
        """Return an empty cache and an empty bank."""
        return CompressedState(like.new_zeros(rows, self.cached, self.dim), like.new_zeros(rows, self.length, self.dim))

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | blocks crossing the edge | cache | segment]."""
        settings = (CompressedMemory, self.window, self.rate, self.length, self.per_call)
        plan = segment.once(settings, lambda: self._plan(segment))
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        source = cache if self._from_cache(segment) else torch.cat([cache, x], dim=1)
        shape = (*plan.born.shape, self.rate, self.dim)
        # By index_select over flattened rows: on CPU many times faster than gather by an expanded index.
        blocks = source.flatten(0, 1).index_select(0, plan.source).view(shape)
        usage = None
        if self.compression.needs_usage:
            probe = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, plan.probe).view(shape)
            usage = _usage(probe, blocks, attention)
        entries = self.compression(blocks, usage).to(x.dtype)
        return View((bank, entries, cache, x), plan.places, _Kept(blocks, usage, plan))

    def _from_cache(self, segment: Segment) -> bool:
        """Whether all that may be compressed in the call was there before it: no gradient goes into the segment."""
        return segment.length <= self.window

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[CompressedState, Losses]:
        """Keep the newest states and the newest entries of the newest document."""
        kept: _Kept = view.kept
        bank, entries, cache, x = view.parts
        index = kept.plan.kept[..., None].expand(-1, -1, self.dim)
        bank = torch.cat([bank, entries], dim=1).gather(1, index).masked_fill(~kept.plan.alive, 0.0)
        losses: Losses = {}
        if self.reconstruction is not None and self.training:
            blocks = kept.blocks.detach()
            losses[self.reconstruction.name] = self.reconstruction(
                blocks,
                self.compression(blocks, kept.usage),
                kept.plan.born,
                trace.inputs.detach(),
                trace.attention,
            )
        return CompressedState(newest(cache, x, segment), bank), losses

    def layout(self) -> Layout | None:
        """Return slots for the window, up to a block more, and the bank; none where calls decide what is seen."""
        return None if self.per_call else Layout(self.window, self.rate, self.length, self.cached)

    def carried(self, state: CompressedState) -> tuple[Tensor, Tensor]:
        """Return cache and bank."""
        return state.hidden, state.bank

    def state_of(self, cache: Tensor, bank: Tensor) -> CompressedState:
        """Return cache and bank as a state."""
        return CompressedState(cache, bank)

    def compressed(self, block: Tensor, probe: Tensor, attention: ContentAttention) -> Tensor:
        """Compress one block a row."""
        usage = _usage(probe[:, None], block[:, None], attention) if self.compression.needs_usage else None
        out: Tensor = self.compression(block[:, None], usage)
        return out[:, 0]

    def _plan(self, segment: Segment) -> Blocks:
        rate, window, length, cached = self.rate, self.window, self.length, self.cached
        device, n = segment.position.device, segment.length
        rows = segment.position.shape[0]
        carried = segment.carried[:, None]

        # Exact states: from their own tick until their block crosses the edge, within their document.
        tick, position, end = cached_places(segment, cached)
        crossing = tick - position + rate * (position // rate + 1) + window - 1
        # The published schedule: seen by the whole call unless their block was in the bank before it.
        expires = torch.where(crossing >= 0, end, -FAR) if self.per_call else torch.minimum(crossing, end)
        expires = torch.where(position >= 0, expires, -FAR)

        # The carried bank: place i holds block number `whole - length + i` of the carried document.
        whole = ((carried - window).clamp(min=-1) // rate).clamp(min=0)
        number = whole - length + torch.arange(length, device=device)
        bank_born = (number + 1) * rate + window - 1 - carried
        bank_end = segment.carried_end[:, None]
        if not self.per_call:
            bank_end = torch.minimum(bank_born + length * rate, bank_end)
        bank_expires = torch.where(number >= 0, bank_end, -FAR)

        # Blocks that cross the edge here: in any `rate` ticks of a row at most one does.
        count = -(-n // rate)
        age = segment.position - window + 1
        crosses = (age >= rate) & (age % rate == 0)
        crosses = torch.nn.functional.pad(crosses, (0, count * rate - n)).view(rows, count, rate)
        born = crosses.any(-1)
        at = crosses.int().argmax(-1) + torch.arange(count, device=device) * rate
        at = at.clamp(max=n - 1)
        # A block whose last state leaves the window at tick i began at tick i - cached: place i of the cache.
        offset = torch.arange(rate, device=device)
        row = torch.arange(rows, device=device)[:, None, None]
        of_source = row * (cached if self._from_cache(segment) else cached + n)
        source = (of_source + at[..., None] + offset).flatten()
        probe = (row * (cached + n) + at[..., None] + cached - rate + 1 + offset).flatten()
        block_end = segment.end.gather(1, at)
        if not self.per_call:
            block_end = torch.minimum(at + length * rate, block_end)
        block_expires = torch.where(born, block_end, -FAR)
        block_born = torch.full_like(at, FAR) if self.per_call else at

        places = Places(
            torch.cat([torch.cat([bank_born, at], dim=1).double() - window - (rate - 1) / 2, tick], dim=1),
            Visibility(
                torch.cat([bank_born, block_born, tick], dim=1),
                torch.cat([bank_expires, block_expires, expires], dim=1),
                n,
                self._sections(n, count),
            ),
        )

        # The next bank: the newest entries of the newest document, in order of birth.
        newest_document = segment.document[:, -1:]
        bank_own = (number >= 0) & (newest_document == 0)
        block_own = born & (segment.document.gather(1, at) == newest_document)
        order = torch.where(torch.cat([bank_own, block_own], 1), torch.cat([bank_born, at], 1), -FAR)
        kept = order.argsort(dim=1, stable=True)[:, order.shape[1] - length :]
        alive = (order.gather(1, kept) > -FAR)[..., None]
        return Blocks(source, probe, born, kept, alive, places)

    def _sections(self, n: int, count: int) -> tuple[Section, ...]:
        """Return static bounds: entries advance by ``rate`` ticks, exact states by one."""
        entries, exact = self.length + count, self.cached + n
        if self.per_call:
            return Section(entries), Section(exact, -self.cached, 1, None)
        return (
            Section(entries, -self.length * self.rate, self.rate, self.length * self.rate),
            Section(exact, -self.cached, 1, self.cached),
        )


def _usage(probe: Tensor, blocks: Tensor, attention: ContentAttention) -> Tensor:
    """Return (rows, blocks, rate): attention to a block's states from the newest ones as it crosses, averaged.

    Args:
        probe: (rows, blocks, rate, dim), the newest states.
        blocks: likewise, those that cross.
        attention: the layer's projections.
    """
    rate, split = blocks.shape[2], "r (b c) h d -> r b c h d"
    with torch.no_grad():
        q = rearrange(attention.project(probe.flatten(1, 2), "query", frozen=True), split, c=rate)
        k = rearrange(attention.project(blocks.flatten(1, 2), "key", frozen=True), split, c=rate)
        score = torch.einsum("rbqhd,rbkhd->rbhqk", q, k) * q.shape[-1] ** -0.5
        return torch.softmax(score, dim=-1).mean(dim=(2, 3))
