"""The compressed memory of the Compressive Transformer (Rae et al. 2020) behind one edge.

A position sees the newest states exactly and, through one entry a block of ``compression_rate``
positions, ``num_entries`` blocks before them. The edge between the two is a function of the position, aligned to
blocks: edge(t) = rate * max(0, floor((t - window + 1) / rate)). A past token is thus either exact or in exactly one
entry. A block is compressed when it crosses the edge, inside the segment whose later queries read it, so
the compression learns from the language model itself, even with a horizon of one segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from memtx.errors import check_at_least
from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.memory.compression import Compression, StridedConvolution
from memtx.memory.kv_ring import RingLayout
from memtx.memory.reconstruction import Reconstruction
from memtx.memory.recurrent import update_cache
from memtx.memory.window_boundary import EvictedBlocks
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class CompressedState:
    """Cache and bank.

    Attributes:
        hidden: (rows, window + compression_rate - 1, dim), exact layer inputs of the row's document, newest last.
        bank: (rows, num_entries, dim), the newest compressed entries, newest last.
    """

    hidden: Tensor
    bank: Tensor


@dataclass(frozen=True)
class BankPlan:
    """What becomes of the bank in a call; shared by all layers of equal settings.

    Attributes:
        indices: (rows, num_entries) int64, which entries of [bank | blocks] are the next bank.
        occupied: (rows, num_entries, 1) bool, which places of the next bank are taken.
        entry_positions: of [bank | blocks | cache | segment].
    """

    indices: Tensor
    occupied: Tensor
    entry_positions: EntryPositions

    def next_bank(self, bank: Tensor, entries: Tensor) -> Tensor:
        """Return the next bank, (rows, num_entries, dim), from the one before and the entries that were born."""
        index = self.indices[..., None].expand(-1, -1, bank.shape[-1])
        return torch.cat([bank, entries], dim=1).gather(1, index).masked_fill(~self.occupied, 0.0)


@dataclass(frozen=True)
class CompressedBlocks:
    """The blocks of a call.

    Attributes:
        blocks: (rows, blocks, compression_rate, dim), their states.
        usage: how much each state was attended to, where the compression wants it.
        entries: (rows, blocks, dim), what they were made.
    """

    blocks: Tensor
    usage: Tensor | None
    entries: Tensor


@dataclass(frozen=True)
class _ReadContext:
    compressed: CompressedBlocks
    plan: BankPlan


class CompressedMemory(Memory[CompressedState]):
    """An exact window and a bank of compressed entries.

    Args:
        dim: width of the hidden states.
        window: exact positions seen at least (up to window + compression_rate - 1, as the edge moves by blocks).
        compression_rate: positions a compressed entry stands for.
        num_entries: compressed entries kept.
        compression: makes the compression from (dim, compression_rate).
        reconstruction: makes an auxiliary loss from (dim, compression_rate); None for none.
        compress_per_segment: False: what a position sees depends on its position alone. True: the published schedule,
            in which all that a call finds in cache and bank is seen by the whole call and blocks are compressed after
            it; results then depend on how a stream is cut.

    Raises:
        MemtxError: a number is out of range.
    """

    has_bank = True
    supports_padding = True
    unbounded = False

    def __init__(
        self,
        dim: int,
        window: int = 512,
        compression_rate: int = 4,
        num_entries: int = 128,
        compression: Callable[[int, int], Compression] = StridedConvolution,
        reconstruction: Callable[[int, int], Reconstruction] | None = None,
        compress_per_segment: bool = False,
    ) -> None:
        super().__init__(dim)
        check_at_least(1, window=window, compression_rate=compression_rate)
        check_at_least(0, num_entries=num_entries)
        self.window = window
        self.compression_rate = compression_rate
        self.num_entries = num_entries
        self.compress_per_segment = compress_per_segment
        self.compression = compression(dim, compression_rate)
        self.reconstruction = reconstruction(dim, compression_rate) if reconstruction is not None else None

    def extra_repr(self) -> str:
        """Say the settings."""
        sizes = f"window={self.window}, compression_rate={self.compression_rate}, num_entries={self.num_entries}"
        return f"{sizes}, compress_per_segment={self.compress_per_segment}"

    @property
    def depends_on_segmentation(self) -> bool:
        """Whether calls decide what is seen."""
        return self.compress_per_segment

    @property
    def cache_length(self) -> int:
        """Places of the cache."""
        return self.window + self.compression_rate - 1

    def init_state(self, batch_size: int, *, like: Tensor) -> CompressedState:
        """Return an empty cache and an empty bank."""
        return CompressedState(
            like.new_zeros(batch_size, self.cache_length, self.dim),
            like.new_zeros(batch_size, self.num_entries, self.dim),
        )

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | blocks crossing the edge | cache | segment]."""
        edge = self._evicted_blocks(segment)
        settings = (CompressedMemory, self.window, self.compression_rate, self.num_entries, self.compress_per_segment)
        plan: BankPlan = segment.memo(settings, lambda: self._bank_plan(segment, edge))
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        made = self._compress(cache, x, edge, attention)
        return View((bank, made.entries, cache, x), plan.entry_positions, _ReadContext(made, plan))

    def _compress(
        self, cache: Tensor, x: Tensor, evicted: EvictedBlocks, attention: ContentAttention
    ) -> CompressedBlocks:
        """Compress what crosses the edge in the call."""
        # No longer than the window: all that crosses was there before, and no gradient goes into the segment.
        source = cache if x.shape[1] <= self.window else torch.cat([cache, x], dim=1)
        shape = (*evicted.valid.shape, self.compression_rate, self.dim)
        # By index_select over flattened rows: on CPU many times faster than gather by an expanded index.
        blocks = source.flatten(0, 1).index_select(0, evicted.block_indices).view(shape)
        usage = None
        if self.compression.needs_usage:
            probe = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, evicted.recent_indices).view(shape)
            usage = _attention_usage(probe, blocks, attention)
        return CompressedBlocks(blocks, usage, self.compression(blocks, usage).to(x.dtype))

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[CompressedState, Losses]:
        """Keep the newest states and the newest entries of the newest document."""
        kept: _ReadContext = view.context
        bank, entries, cache, x = view.parts
        losses = self._auxiliary_losses(kept.compressed, segment, activations)
        return CompressedState(update_cache(cache, x, segment), kept.plan.next_bank(bank, entries)), losses

    def _auxiliary_losses(
        self, compressed: CompressedBlocks, segment: Segment, activations: LayerActivations
    ) -> Losses:
        if self.reconstruction is None or not self.training:
            return {}
        blocks = compressed.blocks.detach()
        entries = self.compression(blocks, compressed.usage)
        born = self._evicted_blocks(segment).valid
        loss = self.reconstruction(blocks, entries, born, activations.inputs.detach(), activations.attention)
        return {self.reconstruction.name: loss}

    def ring_layout(self) -> RingLayout | None:
        """Return slots for the window, up to a block more, and the bank; none where calls decide what is seen."""
        return (
            None
            if self.compress_per_segment
            else RingLayout(self.window, self.compression_rate, self.num_entries, self.cache_length)
        )

    def split_state(self, state: CompressedState) -> tuple[Tensor, Tensor]:
        """Return cache and bank."""
        return state.hidden, state.bank

    def join_state(self, cache: Tensor, bank: Tensor) -> CompressedState:
        """Return cache and bank as a state."""
        return CompressedState(cache, bank)

    def compress_block(self, block: Tensor, recent: Tensor, attention: ContentAttention) -> Tensor:
        """Compress one block a row."""
        usage = _attention_usage(recent[:, None], block[:, None], attention) if self.compression.needs_usage else None
        out: Tensor = self.compression(block[:, None], usage)
        return out[:, 0]

    def _evicted_blocks(self, segment: Segment) -> EvictedBlocks:
        made: EvictedBlocks = segment.memo(
            (EvictedBlocks, self.window, self.compression_rate),
            lambda: EvictedBlocks.from_segment(segment, self.window, self.compression_rate),
        )
        return made

    def _bank_plan(self, segment: Segment, evicted: EvictedBlocks) -> BankPlan:
        rate, window, length = self.compression_rate, self.window, self.num_entries
        carried = segment.past_length[:, None]

        # Exact states: from their own tick until their block crosses the edge, within their document. The published
        # schedule: seen by the whole call unless their block was in the bank before it.
        published = torch.where(evicted.exact_evicted_at >= 0, evicted.exact_document_end, -INFINITE_OFFSET)
        expires = (
            published
            if self.compress_per_segment
            else torch.minimum(evicted.exact_evicted_at, evicted.exact_document_end)
        )

        # The carried bank: place i holds block number `whole - length + i` of the carried document.
        whole = ((carried - window).clamp(min=-1) // rate).clamp(min=0)
        number = whole - length + torch.arange(length, device=carried.device)
        bank_born = (number + 1) * rate + window - 1 - carried
        bank_end, block_end = segment.past_document_end[:, None], evicted.document_end
        if not self.compress_per_segment:
            bank_end = torch.minimum(bank_born + length * rate, bank_end)
            block_end = torch.minimum(evicted.evicted_at + length * rate, block_end)
        bank_expires = torch.where(number >= 0, bank_end, -INFINITE_OFFSET)
        block_expires = torch.where(evicted.valid, block_end, -INFINITE_OFFSET)
        block_born = (
            torch.full_like(evicted.evicted_at, INFINITE_OFFSET) if self.compress_per_segment else evicted.evicted_at
        )
        places = EntryPositions(
            torch.cat(
                [self._block_center(torch.cat([bank_born, evicted.evicted_at], dim=1)), evicted.exact_offset], dim=1
            ),
            Visibility(
                torch.cat([bank_born, block_born, evicted.exact_offset], dim=1),
                torch.cat([bank_expires, block_expires, expires], dim=1),
                segment.length,
                self._key_ranges(segment.length, evicted.evicted_at.shape[1]),
            ),
        )

        # The next bank: the newest entries of the newest document, in order of birth.
        newest_document = segment.last_document_id
        block_own = evicted.valid & (evicted.document_id == newest_document)
        if segment.valid_length is not None:
            block_own &= evicted.evicted_at < segment.valid_length[:, None]
        own = torch.cat([(number >= 0) & (newest_document == 0), block_own], 1)
        order = torch.where(own, torch.cat([bank_born, evicted.evicted_at], 1), -INFINITE_OFFSET)
        kept = order.argsort(dim=1, stable=True)[:, order.shape[1] - length :]
        return BankPlan(kept, (order.gather(1, kept) > -INFINITE_OFFSET)[..., None], places)

    def _block_center(self, visible_from: Tensor) -> Tensor:
        """Return the ticks, float64, at which the centres of blocks stand that are born at ``visible_from``."""
        return visible_from.double() - self.window - (self.compression_rate - 1) / 2

    def _key_ranges(self, length: int, num_blocks: int) -> tuple[KeyRange, ...]:
        """Return static bounds: entries advance by ``compression_rate`` ticks, exact states by one."""
        entries, exact = self.num_entries + num_blocks, self.cache_length + length
        if self.compress_per_segment:
            return KeyRange(entries), KeyRange(exact, -self.cache_length, 1, None)
        return (
            KeyRange(
                entries,
                -self.num_entries * self.compression_rate,
                self.compression_rate,
                self.num_entries * self.compression_rate,
            ),
            KeyRange(exact, -self.cache_length, 1, self.cache_length),
        )


def _attention_usage(recent: Tensor, blocks: Tensor, attention: ContentAttention) -> Tensor:
    """Return attention to a block's states from the newest ones as it crosses, averaged: (rows, blocks, states).

    Args:
        recent: (rows, blocks, compression_rate, dim), the newest states.
        blocks: likewise, those that cross.
        attention: the layer's projections.
    """
    rate, split = blocks.shape[2], "r (b c) h d -> r b c h d"
    with torch.no_grad():
        q = rearrange(attention.project(recent.flatten(1, 2), "query", frozen=True), split, c=rate)
        k = rearrange(attention.project(blocks.flatten(1, 2), "key", frozen=True), split, c=rate)
        score = torch.einsum("rbqhd,rbkhd->rbhqk", q, k) * q.shape[-1] ** -0.5
        return torch.softmax(score, dim=-1).mean(dim=(2, 3))
