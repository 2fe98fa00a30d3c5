"""The compressed memory of the Compressive Transformer (Rae et al. 2020) with a fixed boundary to the exact window.

The query at t sees positions from rate * max(0, floor((t - window + 1) / rate)) on exactly, and before them
``num_entries`` blocks of ``compression_rate`` positions through one entry each, so a past token is either exact or in
exactly one entry. A block is compressed when it leaves the window, inside the segment whose later queries read the
entry: the compression learns from the language model even with truncated backpropagation over a single segment. Of any
``compression_rate`` consecutive tokens at most one evicts a block, so a call of n tokens has room for ceil(n / rate);
unused ones are never visible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.memory.compression import Compression, Reconstruction, StridedConvolution
from memtx.memory.kv_ring import RingLayout
from memtx.memory.parts import gather_entries
from memtx.memory.recurrent import locate_entries, update_cache
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.attention.scores import EntryCounts
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class CompressedState:
    """The cache and the bank.

    Attributes:
        hidden: Exact layer inputs of the open document, newest last, ``(batch, window + compression_rate - 1, dim)``.
        bank: Newest compressed entries, newest last, ``(batch, num_entries, dim)``.
    """

    hidden: Tensor
    bank: Tensor


@dataclass(frozen=True)
class EvictedBlocks:
    """The blocks evicted from the window in a call; shared by all layers of equal settings.

    Attributes:
        block_indices: Indices of the blocks' states in the cache, or in [cache | segment] if the segment is longer than
            the window, over the flattened batch, (batch * blocks * compression_rate,) int64.
        recent_indices: Indices in [cache | segment] of the newest states when each block is evicted, in the same form.
        valid: Blocks that are evicted in this call, ``(batch, blocks)`` bool.
        evicted_at: Offset at which each block is evicted, ``(batch, blocks)`` int64.
        exact_offset: Offsets of the exact states of [cache | segment], ``(batch, cache + length)`` int64.
        exact_evicted_at: Offset at which each exact state's block is evicted; negative before its document.
        exact_document_end: Offset at which each exact state's document ends.
    """

    block_indices: Tensor
    recent_indices: Tensor
    valid: Tensor
    evicted_at: Tensor
    exact_offset: Tensor
    exact_evicted_at: Tensor
    exact_document_end: Tensor

    @classmethod
    def from_segment(cls, segment: Segment, window: int, compression_rate: int) -> EvictedBlocks:
        """Locate a call's blocks; the cache holds the newest ``window + compression_rate - 1`` states."""
        rate, cache_length, length = compression_rate, window + compression_rate - 1, segment.length
        batch_size, device = segment.position.shape[0], segment.position.device
        exact_offset, position, exact_document_end = locate_entries(segment, cache_length)
        exact_evicted_at = exact_offset - position + rate * (position // rate + 1) + window - 1
        num_blocks = -(-length // rate)
        age = segment.position - window + 1
        evicts = F.pad((age >= rate) & (age % rate == 0), (0, num_blocks * rate - length))
        evicts = evicts.view(batch_size, num_blocks, rate)
        evicted_at = evicts.int().argmax(-1) + torch.arange(num_blocks, device=device) * rate
        evicted_at = evicted_at.clamp(max=length - 1)
        # A block whose last state leaves the window at offset i starts at offset i - cache_length, cache index i.
        index = evicted_at[..., None] + torch.arange(rate, device=device)
        stream = torch.arange(batch_size, device=device)[:, None, None]
        source_length = cache_length if length <= window else cache_length + length
        return cls(
            block_indices=(stream * source_length + index).flatten(),
            recent_indices=(stream * (cache_length + length) + index + cache_length - rate + 1).flatten(),
            valid=evicts.any(-1),
            evicted_at=evicted_at,
            exact_offset=exact_offset,
            exact_evicted_at=torch.where(position >= 0, exact_evicted_at, -INFINITE_OFFSET),
            exact_document_end=exact_document_end,
        )


@dataclass(frozen=True)
class BankPlan:
    """The bank's visibility in a call and its next contents; shared by all layers of equal settings.

    Attributes:
        indices: Indices in [bank | blocks] of the next bank's entries, ``(batch, num_entries)`` int64.
        occupied: Slots of the next bank that hold an entry, ``(batch, num_entries, 1)`` bool.
        entry_positions: Positions of [bank | blocks | cache | segment].
    """

    indices: Tensor
    occupied: Tensor
    entry_positions: EntryPositions

    def next_bank(self, bank: Tensor, entries: Tensor) -> Tensor:
        """Return the next bank, ``(batch, num_entries, dim)``, from the old one and the call's new entries."""
        return gather_entries(torch.cat([bank, entries], dim=1), self.indices).masked_fill(~self.occupied, 0.0)


class CompressedMemory(Memory[CompressedState]):
    """An exact window and a bank of compressed entries.

    Args:
        dim: Width of the hidden states.
        window: Exact positions visible, at least; up to window + compression_rate - 1, since blocks leave it whole.
        compression_rate: Positions per compressed entry.
        num_entries: Compressed entries kept.
        compression: Factory of the compression from ``(dim, compression_rate)``.
        reconstruction: Factory of an auxiliary loss from ``(dim, compression_rate)``. None disables it.
        compress_per_segment: If False, visibility depends on positions alone. If True, the published schedule: the
            whole call sees the cache and bank as they were before it, and blocks are compressed after it; results then
            depend on segmentation.
        entry_bias: Initial value of a log-weight, learned per head, that is added to the scaled scores of the entries;
            at -3 they get a twentieth of their weight. None disables it.
        language_gradient: If True, the language model's loss trains the compression, too. If False, the reconstruction
            loss alone does, as published (Rae et al. 2020, section 3.2), and no gradient enters an entry's states.

    Raises:
        MemtxError: A number is out of range, or nothing would train the compression.
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
        entry_bias: float | None = None,
        language_gradient: bool = True,
    ) -> None:
        super().__init__(dim)
        check_at_least(1, window=window, compression_rate=compression_rate)
        check_at_least(0, num_entries=num_entries)
        self.window = window
        self.compression_rate = compression_rate
        self.num_entries = num_entries
        self.compress_per_segment = self.depends_on_segmentation = compress_per_segment
        self.entry_bias = entry_bias
        self.compression = compression(dim, compression_rate)
        self.reconstruction = reconstruction(dim, compression_rate) if reconstruction is not None else None
        self.language_gradient = language_gradient
        if not language_gradient and reconstruction is None and any(True for _ in self.compression.parameters()):
            message = f"language_gradient is False, but {type(self.compression).__name__} has no other loss."
            raise MemtxError(message, "Give a reconstruction, or a compression without weights such as MeanPooling.")

    @property
    def cache_length(self) -> int:
        """Length of the cache."""
        return self.window + self.compression_rate - 1

    def init_state(self, batch_size: int, *, like: Tensor) -> CompressedState:
        """Return an empty cache and an empty bank."""
        return CompressedState(
            like.new_zeros(batch_size, self.cache_length, self.dim),
            like.new_zeros(batch_size, self.num_entries, self.dim),
        )

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | evicted blocks | cache | segment]."""
        evicted = self._evicted_blocks(segment)
        settings = (CompressedMemory, self.window, self.compression_rate, self.num_entries, self.compress_per_segment)
        plan: BankPlan = segment.memo(settings, lambda: self._bank_plan(segment, evicted))
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        entries, losses = self._compress(cache, x, evicted, attention)
        return View((bank, entries, cache, x), plan.entry_positions, plan, losses=losses)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[CompressedState, Losses]:
        """Keep the newest states and the newest entries of the open document."""
        plan: BankPlan = view.context
        bank, entries, cache, x = view.parts
        return CompressedState(update_cache(cache, x, segment), plan.next_bank(bank, entries)), view.losses

    def ring_layout(self) -> RingLayout | None:
        """Return slots for the bank and the cache, or None if ``compress_per_segment``."""
        if self.compress_per_segment:
            return None
        return RingLayout(self.window, self.compression_rate, self.num_entries, self.cache_length)

    def split_state(self, state: CompressedState) -> tuple[Tensor, Tensor]:
        """Return the cache and the bank."""
        return state.hidden, state.bank

    def join_state(self, cache: Tensor, bank: Tensor) -> CompressedState:
        """Return the state of a cache and a bank."""
        return CompressedState(cache, bank)

    def compress_block(self, block: Tensor, recent: Tensor, attention: ContentAttention) -> Tensor:
        """Compress one block per stream."""
        usage = _attention_usage(recent[:, None], block[:, None], attention) if self.compression.needs_usage else None
        return self.compression(block[:, None], usage)[:, 0]

    def _compress(
        self, cache: Tensor, x: Tensor, evicted: EvictedBlocks, attention: ContentAttention
    ) -> tuple[Tensor, Losses]:
        """Return the entries of the blocks evicted in the call, ``(batch, blocks, dim)``, and the auxiliary losses."""
        # Up to the window's length, all evicted states are in the cache, and no gradient enters the segment.
        source = cache if x.shape[1] <= self.window else torch.cat([cache, x], dim=1)
        shape = (*evicted.valid.shape, self.compression_rate, self.dim)
        blocks = source.flatten(0, 1).index_select(0, evicted.block_indices).view(shape)
        usage = None
        if self.compression.needs_usage:
            recent = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, evicted.recent_indices).view(shape)
            usage = _attention_usage(recent, blocks, attention)
        losses: Losses = {}
        if self.reconstruction is not None and self.training:
            detached = blocks.detach()
            detached_entries = self.compression(detached, usage)
            loss = self.reconstruction(detached, detached_entries, evicted.valid, x.detach(), attention)
            losses[self.reconstruction.name] = loss
            if not self.language_gradient:
                return detached_entries.detach().to(x.dtype), losses
        entries: Tensor = self.compression(blocks, usage).to(x.dtype)
        return entries if self.language_gradient else entries.detach(), losses

    def _evicted_blocks(self, segment: Segment) -> EvictedBlocks:
        return segment.memo(
            (EvictedBlocks, self.window, self.compression_rate),
            lambda: EvictedBlocks.from_segment(segment, self.window, self.compression_rate),
        )

    def _bank_plan(self, segment: Segment, evicted: EvictedBlocks) -> BankPlan:
        rate, num_entries = self.compression_rate, self.num_entries
        past_length = segment.past_length[:, None]

        # Slot i of the carried bank holds block `num_evicted - num_entries + i` of the document open before the call.
        num_evicted = self._num_evicted(past_length - 1)
        block = num_evicted - num_entries + torch.arange(num_entries, device=past_length.device)
        bank_from = (block + 1) * rate + self.window - 1 - past_length
        bank_until = segment.past_document_end[:, None]
        blocks_until = segment.document_end.gather(1, evicted.evicted_at)
        exact_until = evicted.exact_document_end
        if self.compress_per_segment:
            # All are seen by the whole call, exact states only if their block was not in the bank before it.
            blocks_from = torch.full_like(evicted.evicted_at, INFINITE_OFFSET)
            exact_until = torch.where(evicted.exact_evicted_at >= 0, exact_until, -INFINITE_OFFSET)
        else:
            blocks_from = evicted.evicted_at
            bank_until = torch.minimum(bank_from + num_entries * rate, bank_until)
            blocks_until = torch.minimum(blocks_from + num_entries * rate, blocks_until)
            exact_until = torch.minimum(evicted.exact_evicted_at, exact_until)
        bank_until = torch.where(block >= 0, bank_until, -INFINITE_OFFSET)
        blocks_until = torch.where(evicted.valid, blocks_until, -INFINITE_OFFSET)
        evicted_at = torch.cat([bank_from, evicted.evicted_at], dim=1)
        entry_positions = EntryPositions(
            torch.cat([self._block_center(evicted_at), evicted.exact_offset], dim=1),
            Visibility(
                torch.cat([bank_from, blocks_from, evicted.exact_offset], dim=1),
                torch.cat([bank_until, blocks_until, exact_until], dim=1),
                segment.length,
                self._key_ranges(segment.length, evicted.evicted_at.shape[1]),
            ),
            # Not of the segment, which holds this plan: a cycle would outlive the call.
            counts=partial(self._count_entries, segment.position, past_length, evicted.evicted_at, block),
        )

        # The next bank: the newest entries of the newest document, oldest first.
        last_document = segment.last_document_id
        in_document = evicted.valid & (segment.document_id.gather(1, evicted.evicted_at) == last_document)
        if segment.valid_length is not None:
            in_document &= evicted.evicted_at < segment.valid_length[:, None]
        stays = torch.cat([(block >= 0) & (last_document == 0), in_document], dim=1)
        age_order = torch.where(stays, evicted_at, -INFINITE_OFFSET)
        indices = age_order.argsort(dim=1, stable=True)[:, age_order.shape[1] - num_entries :]
        return BankPlan(indices, (age_order.gather(1, indices) > -INFINITE_OFFSET)[..., None], entry_positions)

    def _count_entries(self, position: Tensor, past_length: Tensor, evicted_at: Tensor, block: Tensor) -> EntryCounts:
        """Return the distances of [bank | blocks], in which ``compression_rate`` states became one position.

        Args:
            position: Position of each token of the call, ``(batch, length)``.
            past_length: Tokens of the open document before the call, ``(batch, 1)``.
            evicted_at: Offset at which each block leaves the window, ``(batch, blocks)``.
            block: Number of each entry of the bank in its document, ``(batch, num_entries)``.
        """
        rate = self.compression_rate
        num_evicted = self._num_evicted(past_length - 1 if self.compress_per_segment else position)
        newest = self._num_evicted(position.gather(1, evicted_at)) - 1
        query = position
        if self.compress_per_segment:
            query = past_length + torch.arange(position.shape[1], device=position.device)
        bounds = self.window, self.window + rate + self.num_entries
        key = torch.cat([block, newest], dim=1)
        return EntryCounts(query - (rate - 1) * num_evicted, key, *bounds, slope=int(self.compress_per_segment))

    def _num_evicted(self, position: Tensor) -> Tensor:
        """Return the number of blocks of a document that have left the window at the token at ``position``."""
        return ((position - self.window + 1).clamp(min=-1) // self.compression_rate).clamp(min=0)

    def _block_center(self, evicted_at: Tensor) -> Tensor:
        """Return the offsets, float64, of the centers of blocks evicted at ``evicted_at``."""
        return evicted_at.double() - self.window - (self.compression_rate - 1) / 2

    def _key_ranges(self, length: int, num_blocks: int) -> tuple[KeyRange, ...]:
        """Return static bounds: entries advance by ``compression_rate`` offsets, exact states by one."""
        entries, exact, rate = self.num_entries + num_blocks, self.cache_length + length, self.compression_rate
        if self.compress_per_segment:
            # No query of the call sees the evicted blocks.
            blocks = KeyRange(num_blocks, INFINITE_OFFSET, 1)
            return KeyRange(self.num_entries), blocks, KeyRange(exact, -self.cache_length, 1, None)
        span = self.num_entries * rate
        return KeyRange(entries, -span, rate, span), KeyRange(exact, -self.cache_length, 1, self.cache_length)


def _attention_usage(recent: Tensor, blocks: Tensor, attention: ContentAttention) -> Tensor:
    """Return the mean attention to each block's states from the states that were newest when it was evicted.

    Both are ``(batch, blocks, compression_rate, dim)``, the result ``(batch, blocks, compression_rate)``.
    """
    rate, by_block = blocks.shape[2], "b (n c) h d -> b n c h d"
    with torch.no_grad():
        q = rearrange(attention.project(recent.flatten(1, 2), "query", frozen=True), by_block, c=rate)
        k = rearrange(attention.project(blocks.flatten(1, 2), "key", frozen=True), by_block, c=rate)
        scores = torch.einsum("bnqhd,bnkhd->bnhqk", q, k) * q.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-1).mean(dim=(2, 3))
