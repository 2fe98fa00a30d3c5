"""The compressed memory of the Compressive Transformer (Rae et al. 2020) behind one edge.

A position sees the newest states exactly and, through one entry a block of ``rate`` positions, ``length``
blocks before them. The edge between the two is a function of the position, aligned to blocks:
edge(t) = rate * max(0, floor((t - window + 1) / rate)). A past token is thus either exact or in exactly one
entry. A block is compressed when it crosses the edge, inside the segment whose later queries read it, so
the compression learns from the language model itself, even with a horizon of one segment.
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
from memtx.memory.edge import Edge
from memtx.memory.reconstruction import Reconstruction
from memtx.memory.recurrent import newest
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
    """What becomes of the bank in a call; shared by all layers of equal settings.

    Attributes:
        kept: (rows, length) int64, which entries of [bank | blocks] are the next bank.
        alive: (rows, length, 1) bool, which places of the next bank are taken.
        places: of [bank | blocks | cache | segment].
    """

    kept: Tensor
    alive: Tensor
    places: Places

    def following(self, bank: Tensor, entries: Tensor) -> Tensor:
        """Return the next bank, (rows, length, dim), from the one before and the entries that were born."""
        index = self.kept[..., None].expand(-1, -1, bank.shape[-1])
        return torch.cat([bank, entries], dim=1).gather(1, index).masked_fill(~self.alive, 0.0)


@dataclass(frozen=True)
class Compressed:
    """The blocks of a call.

    Attributes:
        blocks: (rows, blocks, rate, dim), their states.
        usage: how much each state was attended to, where the compression wants it.
        entries: (rows, blocks, dim), what they were made.
    """

    blocks: Tensor
    usage: Tensor | None
    entries: Tensor


@dataclass(frozen=True)
class _Kept:
    compressed: Compressed
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
    padded = True
    lasting = False

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
    def cut_matters(self) -> bool:
        """Whether calls decide what is seen."""
        return self.per_call

    @property
    def cached(self) -> int:
        """Places of the cache."""
        return self.window + self.rate - 1

    def init_state(self, rows: int, *, like: Tensor) -> CompressedState:
        """Return an empty cache and an empty bank."""
        return CompressedState(like.new_zeros(rows, self.cached, self.dim), like.new_zeros(rows, self.length, self.dim))

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | blocks crossing the edge | cache | segment]."""
        edge = self._edge(segment)
        settings = (CompressedMemory, self.window, self.rate, self.length, self.per_call)
        plan: Blocks = segment.once(settings, lambda: self._plan(segment, edge))
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        made = self._compress(cache, x, edge, attention)
        return View((bank, made.entries, cache, x), plan.places, _Kept(made, plan))

    def _compress(self, cache: Tensor, x: Tensor, edge: Edge, attention: ContentAttention) -> Compressed:
        """Compress what crosses the edge in the call."""
        # No longer than the window: all that crosses was there before, and no gradient goes into the segment.
        source = cache if x.shape[1] <= self.window else torch.cat([cache, x], dim=1)
        shape = (*edge.born.shape, self.rate, self.dim)
        # By index_select over flattened rows: on CPU many times faster than gather by an expanded index.
        blocks = source.flatten(0, 1).index_select(0, edge.source).view(shape)
        usage = None
        if self.compression.needs_usage:
            probe = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, edge.probe).view(shape)
            usage = _usage(probe, blocks, attention)
        return Compressed(blocks, usage, self.compression(blocks, usage).to(x.dtype))

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[CompressedState, Losses]:
        """Keep the newest states and the newest entries of the newest document."""
        kept: _Kept = view.kept
        bank, entries, cache, x = view.parts
        losses = self._losses(kept.compressed, segment, trace)
        return CompressedState(newest(cache, x, segment), kept.plan.following(bank, entries)), losses

    def _losses(self, made: Compressed, segment: Segment, trace: Trace) -> Losses:
        if self.reconstruction is None or not self.training:
            return {}
        blocks = made.blocks.detach()
        entries = self.compression(blocks, made.usage)
        born = self._edge(segment).born
        loss = self.reconstruction(blocks, entries, born, trace.inputs.detach(), trace.attention)
        return {self.reconstruction.name: loss}

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

    def _edge(self, segment: Segment) -> Edge:
        made: Edge = segment.once((Edge, self.window, self.rate), lambda: Edge.of(segment, self.window, self.rate))
        return made

    def _plan(self, segment: Segment, edge: Edge) -> Blocks:
        rate, window, length = self.rate, self.window, self.length
        carried = segment.carried[:, None]

        # Exact states: from their own tick until their block crosses the edge, within their document. The published
        # schedule: seen by the whole call unless their block was in the bank before it.
        published = torch.where(edge.leaves >= 0, edge.exact_end, -FAR)
        expires = published if self.per_call else torch.minimum(edge.leaves, edge.exact_end)

        # The carried bank: place i holds block number `whole - length + i` of the carried document.
        whole = ((carried - window).clamp(min=-1) // rate).clamp(min=0)
        number = whole - length + torch.arange(length, device=carried.device)
        bank_born = (number + 1) * rate + window - 1 - carried
        bank_end, block_end = segment.carried_end[:, None], edge.end
        if not self.per_call:
            bank_end = torch.minimum(bank_born + length * rate, bank_end)
            block_end = torch.minimum(edge.at + length * rate, block_end)
        bank_expires = torch.where(number >= 0, bank_end, -FAR)
        block_expires = torch.where(edge.born, block_end, -FAR)
        block_born = torch.full_like(edge.at, FAR) if self.per_call else edge.at
        places = Places(
            torch.cat([self._centre(torch.cat([bank_born, edge.at], dim=1)), edge.tick], dim=1),
            Visibility(
                torch.cat([bank_born, block_born, edge.tick], dim=1),
                torch.cat([bank_expires, block_expires, expires], dim=1),
                segment.length,
                self._sections(segment.length, edge.at.shape[1]),
            ),
        )

        # The next bank: the newest entries of the newest document, in order of birth.
        newest_document = segment.newest_document
        block_own = edge.born & (edge.document == newest_document)
        if segment.stop is not None:
            block_own &= edge.at < segment.stop[:, None]
        own = torch.cat([(number >= 0) & (newest_document == 0), block_own], 1)
        order = torch.where(own, torch.cat([bank_born, edge.at], 1), -FAR)
        kept = order.argsort(dim=1, stable=True)[:, order.shape[1] - length :]
        return Blocks(kept, (order.gather(1, kept) > -FAR)[..., None], places)

    def _centre(self, born: Tensor) -> Tensor:
        """Return the ticks, float64, at which the centres of blocks stand that are born at ``born``."""
        return born.double() - self.window - (self.rate - 1) / 2

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
