"""Decoding token by token with keys and values in ring buffers that are written in place.

A call projects every carried state to keys and values again; a stream that continues one token at a time keeps the
projections. Position p is in slot p modulo the number of exact slots, block b in slot b modulo the number of bank
entries. Visibility is the same, so a ring can be opened from a state and closed to one at any token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from memtx.memo import Memo
from memtx.memory.base import ContentAttention
from memtx.memory.parts import gather_entries
from memtx.ops.attention.mask import BankSplit, DilatedWindow, KeyRange, Visibility, split_bank


@dataclass(frozen=True)
class RingLayout:
    """The slots that a token sees: the bank's, then the exact ones.

    Attributes:
        window: Exact positions visible, at least.
        compression_rate: Positions per compressed entry; 1 if nothing is compressed.
        num_entries: Compressed entries kept.
        cache_length: Length of the cache in the memory's state.
        near_window: Exact positions of the near window. None if there is no other.
        dilated: Positions that each head sees, out of the slots. None if every head sees all.
    """

    window: int
    compression_rate: int
    num_entries: int
    cache_length: int
    near_window: int | None = None
    dilated: DilatedWindow | None = None

    @property
    def num_exact_slots(self) -> int:
        """Number of slots for exact positions."""
        return self.window + self.compression_rate - 1

    @property
    def num_slots(self) -> int:
        """Number of all slots."""
        return self.num_entries + self.num_exact_slots

    def num_evicted_blocks(self, position: Tensor) -> Tensor:
        """Return the number of blocks that have left the window when the token at ``position`` is read."""
        return ((position - self.window + 1).clamp(min=-1) // self.compression_rate).clamp(min=0)

    def evicts_block(self, position: int) -> bool:
        """Return True if a block leaves the window when the token at ``position`` is read."""
        age = position - self.window + 1
        return self.num_entries > 0 and age >= self.compression_rate and age % self.compression_rate == 0

    def block_center(self, block: Tensor) -> Tensor:
        """Return the position of a block's compressed entry, float64."""
        return block.double() * self.compression_rate + (self.compression_rate - 1) / 2

    def slot_contents(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contents of every slot once the token at ``position`` ``(batch,)`` is written.

        These are blocks, ``(batch, num_entries)``, and positions, ``(batch, num_exact_slots)``, both int64 and negative
        in unwritten slots.
        """
        newest = self.num_evicted_blocks(position) - 1
        block = slot_positions(newest, self.num_entries) if self.num_entries else newest.new_zeros(len(newest), 0)
        return block, slot_positions(position, self.num_exact_slots)


def slot_positions(position: Tensor, num_slots: int) -> Tensor:
    """Return the newest position in each slot, ``(batch, num_slots)``, below 0 if none.

    ``position`` ``(batch,)`` is the last one written; each is in the slot of its number modulo ``num_slots``.
    """
    slot = torch.arange(num_slots, device=position.device)
    return position[:, None] - (position[:, None] - slot) % num_slots


@runtime_checkable
class RingDecodable(Protocol):
    """A memory whose state can be kept in a ring buffer and decoded in place."""

    def ring_layout(self) -> RingLayout | None:
        """Return the slots that decoding needs, or None if these settings cannot be decoded in place."""

    def split_state(self, state: Any) -> tuple[Tensor, Tensor]:
        """Return the exact inputs, ``(batch, cache_length, dim)``, and the entries, ``(batch, num_entries, dim)``."""

    def join_state(self, cache: Tensor, bank: Tensor) -> Any:
        """Return the state that :meth:`split_state` splits into ``cache`` and ``bank``."""

    def compress_block(self, block: Tensor, recent: Tensor, attention: ContentAttention) -> Tensor:
        """Compress the inputs that leave the window, one block per stream, to ``(batch, dim)``.

        The block and the newest inputs, ``recent``, are ``(batch, compression_rate, dim)``.
        """


@dataclass(frozen=True)
class DecodeBuffers:
    """The buffers of one layer, which steps of decoding change in place.

    Attributes:
        buffers: Tensors whose dimension 0 is the batch.
        structure: Structure of the state that they are the leaves of; None for a :class:`KVRing`.
    """

    buffers: tuple[Tensor, ...]
    structure: Any = None

    def narrow(self, batch_size: int) -> Self:
        """Return a view of the first ``batch_size`` streams that writes into these buffers."""
        return replace(self, buffers=tuple(buffer[:batch_size] for buffer in self.buffers))

    def resized(self, batch_size: int) -> Self:
        """Return a copy with room for ``batch_size`` streams; new ones are zero."""
        buffers = tuple(buffer.new_zeros(batch_size, *buffer.shape[1:]) for buffer in self.buffers)
        larger = replace(self, buffers=buffers)
        larger.copy_from(0, self)
        return larger

    def copy_from(self, index: int, source: DecodeBuffers) -> None:
        """Overwrite the streams from ``index`` on with those of another layer's buffers."""
        for target, update in zip(self.buffers, source.buffers, strict=True):
            target[index : index + update.shape[0]] = update

    def snapshot(self, position: Tensor) -> Callable[[], None]:
        """Return a function that undoes what steps at ``position`` ``(batch,)`` write: here, all contents are saved."""
        saved = [buffer.clone() for buffer in self.buffers]

        def restore() -> None:
            for buffer, content in zip(self.buffers, saved, strict=True):
                buffer.copy_(content)

        return restore

    def compact(self, sources: Tensor, targets: Tensor) -> None:
        """Overwrite the streams ``targets`` ``(n,)`` with the streams ``sources`` ``(n,)``, all at once."""
        for buffer in self.buffers:
            buffer[targets] = buffer[sources]


@dataclass(frozen=True, kw_only=True)
class KVRing(DecodeBuffers):
    """The ring buffers of one attention layer: ``buffers`` are ``hidden`` and ``key_value``.

    Attributes:
        layout: Layout of the slots.
    """

    layout: RingLayout

    def snapshot(self, position: Tensor) -> Callable[[], None]:
        """Return a function that undoes what steps at ``position`` ``(batch,)`` write: at most two slots per stream."""
        plan = DecodeStep(position, frozenset()).plan(self.layout)
        stream = torch.arange(position.shape[0], device=position.device)
        index = stream[:, None], torch.stack([plan.slot, plan.bank_slot], dim=1)
        saved = [buffer[index] for buffer in self.buffers]

        def restore() -> None:
            for buffer, content in zip(self.buffers, saved, strict=True):
                buffer[index] = content

        return restore

    @property
    def hidden(self) -> Tensor:
        """Attention inputs and compressed entries, ``(batch, slots, dim)``."""
        return self.buffers[0]

    @property
    def key_value(self) -> Tensor:
        """Keys with positions applied, and values, ``(batch, slots, 2, kv_heads, head_dim)``."""
        return self.buffers[1]


@dataclass(frozen=True)
class DecodePlan:
    """The slots that the current token reads and writes in layers of one layout.

    Attributes:
        slot: Exact slot to write, ``(batch,)`` int64.
        visible: Slots that the token sees, ``(batch, slots)`` bool.
        visibility: Visibility of the slots for one query.
        offset: Offset of each slot's entry from the query, ``(batch, slots)`` float64.
        distance: Computes the distance of each slot's entry from the query in entries, ``(batch, slots)`` int64.
        block_slots: Slots of the block that leaves the window, ``(batch, compression_rate)`` int64; None if no stream
            evicts one.
        recent_slots: Slots of the newest positions, in the same form.
        bank_slot: Bank slot of the evicted block's entry, ``(batch,)`` int64.
        evicts_block: Streams that evict a block, ``(batch,)`` bool.
        entry_position: Position of the evicted block's entry, ``(batch, 1)`` float64.
        near_window: Exact positions of the near window. None if the slots of the bank are all that lies beyond.
    """

    slot: Tensor
    visible: Tensor
    visibility: Visibility
    offset: Tensor
    distance: Callable[[], Tensor]
    block_slots: Tensor | None
    recent_slots: Tensor | None
    bank_slot: Tensor
    evicts_block: Tensor
    entry_position: Tensor
    near_window: int | None

    @property
    def bank_split(self) -> BankSplit:
        """The slots beyond the exact window, and those in it."""
        return self.visibility.memo("bank_split", self._split) if self.near_window else split_bank(self.visibility)

    def _split(self) -> BankSplit:
        is_near = self.offset > -float(self.near_window or 0)
        start, end, ranges = self.visibility.visible_from, self.visibility.visible_until, self.visibility.key_ranges
        near, far = (start.masked_fill(hidden, 1) for hidden in (~is_near, is_near))
        return BankSplit(Visibility(far, end, 1, ranges), Visibility(near, end, 1, ranges))


@dataclass(frozen=True)
class DecodeStep(Memo):
    """One decoding step: one token per stream.

    Attributes:
        position: Position of each token within its document, ``(batch,)`` int64.
        evicting_layouts: Layouts in which some stream evicts a block now. Known on the host, so that other steps skip
            the compression.
    """

    position: Tensor
    evicting_layouts: frozenset[RingLayout]

    def plan(self, layout: RingLayout) -> DecodePlan:
        """Return the plan for layers of ``layout``."""
        return self.memo(layout, lambda: self._build_plan(layout))

    def _build_plan(self, layout: RingLayout) -> DecodePlan:
        current, rate, num_exact = self.position[:, None], layout.compression_rate, layout.num_exact_slots
        block, position = layout.slot_contents(self.position)
        num_evicted = layout.num_evicted_blocks(self.position)
        first_exact = num_evicted[:, None] * rate
        visible = torch.cat([block >= 0, (position >= first_exact) & (position >= 0)], dim=1)
        offset = torch.cat([layout.block_center(block), position.double()], dim=1) - current
        visible_from = torch.where(visible, 0, 1)
        age = self.position - layout.window + 1
        block_slots = recent_slots = None
        if layout in self.evicting_layouts:
            index = torch.arange(rate, device=current.device)
            block_slots = layout.num_entries + (current - num_exact + index) % num_exact
            recent_slots = layout.num_entries + (current - rate + 1 + index) % num_exact
        # Two ranges as in a call, the bank's first.
        ranges = KeyRange(layout.num_entries), KeyRange(num_exact)
        return DecodePlan(
            slot=layout.num_entries + self.position % num_exact,
            visible=visible,
            visibility=Visibility(visible_from, torch.ones_like(visible_from), 1, ranges),
            offset=offset,
            distance=lambda: torch.cat(
                [current - (rate - 1) * num_evicted[:, None] - block, current - position], dim=1
            ),
            block_slots=block_slots,
            recent_slots=recent_slots,
            bank_slot=(num_evicted - 1).clamp(min=0) % max(layout.num_entries, 1),
            evicts_block=(age >= rate) & (age % rate == 0),
            entry_position=layout.block_center(num_evicted[:, None] - 1),
            near_window=layout.near_window,
        )


def to_ring(layout: RingLayout, cache: Tensor, bank: Tensor, past_length: Tensor) -> Tensor:
    """Arrange the contents of a state in slots, ``(batch, slots, dim)``, zero in unwritten ones.

    Exact inputs, ``(batch, cache_length, dim)``, and compressed entries, ``(batch, num_entries, dim)``, have the newest
    last; ``past_length`` is the number of tokens read so far, ``(batch,)`` int64.
    """
    block, position = layout.slot_contents(past_length - 1)
    first_block = layout.num_evicted_blocks(past_length - 1)[:, None] - layout.num_entries
    first_position = past_length[:, None] - layout.cache_length
    entries = _gather_or_zero(bank, torch.where(block >= 0, block - first_block, -1))
    states = _gather_or_zero(cache, torch.where(position >= 0, position - first_position, -1))
    return torch.cat([entries, states], dim=1)


def from_ring(layout: RingLayout, hidden: Tensor, past_length: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cache and bank of a state from its slots: the inverse of :func:`to_ring`."""
    first_block = layout.num_evicted_blocks(past_length - 1)[:, None] - layout.num_entries
    block = first_block + torch.arange(layout.num_entries, device=hidden.device)
    position = past_length[:, None] - layout.cache_length + torch.arange(layout.cache_length, device=hidden.device)
    exact_slot = layout.num_entries + position % layout.num_exact_slots
    bank = _gather_or_zero(hidden, torch.where(block >= 0, block % max(layout.num_entries, 1), -1))
    return _gather_or_zero(hidden, torch.where(position >= 0, exact_slot, -1)), bank


def _gather_or_zero(x: Tensor, index: Tensor) -> Tensor:
    """Return x ``(batch, n, dim)`` at index ``(batch, m)``, zero where the index is negative."""
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, x.shape[2])
    return gather_entries(x, index.clamp(min=0)).masked_fill((index < 0)[..., None], 0.0)
