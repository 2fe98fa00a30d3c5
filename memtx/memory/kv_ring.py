"""Decoding token by token: a layer's keys and values in buffers that are written in place, each place used again.

A state is a value and holds hidden states, so a call projects all that it carries to keys and values anew. A stream
that goes on one token at a time keeps them instead: position p stands in slot p modulo the exact slots, block b in
slot b modulo the memory's length, and a token writes one slot. What a position sees is the same, so a ring can be
opened from a state and closed to one at any token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.memo import Memo
from memtx.ops.attention.mask import KeyRange, Visibility


@dataclass(frozen=True)
class RingLayout:
    """What a token sees: the exact slots, and before them the bank's.

    Attributes:
        window: exact positions seen at least.
        compression_rate: positions a compressed entry stands for; 1 where nothing is compressed.
        num_entries: compressed entries kept.
        cache_length: of the cache in the memory's state.
    """

    window: int
    compression_rate: int
    num_entries: int
    cache_length: int

    @property
    def num_exact_slots(self) -> int:
        """Slots of exact positions."""
        return self.window + self.compression_rate - 1

    @property
    def num_slots(self) -> int:
        """All slots, the bank's first."""
        return self.num_entries + self.num_exact_slots

    def num_evicted_blocks(self, position: Tensor) -> Tensor:
        """Return how many blocks have crossed the edge when the token at ``position`` is read."""
        return ((position - self.window + 1).clamp(min=-1) // self.compression_rate).clamp(min=0)

    def evicts_block(self, position: int) -> bool:
        """Return whether the token at ``position`` brings a block across the edge."""
        age = position - self.window + 1
        return self.num_entries > 0 and age >= self.compression_rate and age % self.compression_rate == 0

    def slot_contents(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return which (block, position) every slot holds once the token at ``position`` (rows,) is written.

        Returns:
            (rows, num_entries) and (rows, num_exact_slots) int64, negative where nothing was written yet.
        """
        newest = self.num_evicted_blocks(position)[:, None] - 1
        bank = torch.arange(self.num_entries, device=position.device)
        slot = torch.arange(self.num_exact_slots, device=position.device)
        of_bank = newest - (newest - bank) % self.num_entries if self.num_entries else newest.expand(-1, 0)
        return of_bank, position[:, None] - (position[:, None] - slot) % self.num_exact_slots


@dataclass
class KVRing:
    """One layer's buffers.

    Attributes:
        layout: of the slots.
        hidden: (rows, slots, dim), attention inputs and compressed entries, to be compressed or handed back.
        key_value: (rows, slots, 2, kv_heads, head_dim), keys placed by their positions, and values.
    """

    layout: RingLayout
    hidden: Tensor
    key_value: Tensor

    def narrow(self, batch_size: int) -> KVRing:
        """Return the first rows as a ring that writes into this one."""
        return KVRing(self.layout, self.hidden[:batch_size], self.key_value[:batch_size])

    def resized(self, batch_size: int) -> KVRing:
        """Return a ring of so many rows that begins with this one's; the rest is zero."""
        larger = KVRing(
            self.layout,
            self.hidden.new_zeros(batch_size, *self.hidden.shape[1:]),
            self.key_value.new_zeros(batch_size, *self.key_value.shape[1:]),
        )
        larger.copy_from(0, self)
        return larger

    def copy_from(self, index: int, source: KVRing) -> None:
        """Write another ring's rows over this one's from ``index`` on."""
        for own, new in ((self.hidden, source.hidden), (self.key_value, source.key_value)):
            own[index : index + new.shape[0]] = new

    def compact(self, sources: Tensor, targets: Tensor) -> None:
        """Write the rows ``sources`` (n,) over the rows ``targets`` (n,), all at once."""
        for own in (self.hidden, self.key_value):
            own[targets] = own[sources]


@dataclass(frozen=True)
class DecodePlan:
    """What the current token means to layers of one layout.

    Attributes:
        slot: (rows,) int64, the exact slot to be written.
        visibility: of the slots, for one query.
        offset: (rows, slots) float64, where each slot's entry stands, the query being at 0.
        block_slots: (rows, compression_rate) int64, the slots of the block that crosses the edge; None where no row's
            does.
        recent_slots: likewise the slots of the newest positions.
        bank_slot: (rows,) int64, the bank's slot for its entry.
        evicts_block: (rows,) bool, the rows whose block crosses.
        entry_position: (rows, 1) float64, the position of its entry.
    """

    slot: Tensor
    visibility: Visibility
    offset: Tensor
    block_slots: Tensor | None
    recent_slots: Tensor | None
    bank_slot: Tensor
    evicts_block: Tensor
    entry_position: Tensor


@dataclass(frozen=True)
class DecodeStep(Memo):
    """One token a row.

    Attributes:
        position: (rows,) int64, of the token within its document.
        evicting_layouts: layouts in which a block of some row crosses the edge now: known to the host, so that the
            other steps need not compress.
    """

    position: Tensor
    evicting_layouts: frozenset[RingLayout]

    def plan(self, layout: RingLayout) -> DecodePlan:
        """Return what the token means to layers of a layout."""
        return self.memo(layout, lambda: self._build_plan(layout))

    def _build_plan(self, layout: RingLayout) -> DecodePlan:
        at, rate, exact = self.position[:, None], layout.compression_rate, layout.num_exact_slots
        block, position = layout.slot_contents(self.position)
        edge = layout.num_evicted_blocks(self.position)[:, None] * rate
        visible = torch.cat([block >= 0, (position >= edge) & (position >= 0)], dim=1)
        centre = block.double() * rate + (rate - 1) / 2
        tick = torch.cat([centre, position.double()], dim=1) - at
        born = torch.where(visible, 0, 1)
        crossing = (self.position >= layout.window + rate - 1) & ((self.position - layout.window + 1) % rate == 0)
        newest = layout.num_evicted_blocks(self.position) - 1
        source = probe = None
        if layout in self.evicting_layouts:
            offset = torch.arange(rate, device=at.device)
            source = layout.num_entries + (at - exact + offset) % exact
            probe = layout.num_entries + (at - rate + 1 + offset) % exact
        return DecodePlan(
            layout.num_entries + self.position % exact,
            Visibility(born, torch.ones_like(born), 1, (KeyRange(layout.num_slots),)),
            tick,
            source,
            probe,
            newest.clamp(min=0) % max(layout.num_entries, 1),
            crossing,
            newest[:, None].double() * rate + (rate - 1) / 2,
        )


def to_ring(layout: RingLayout, cache: Tensor, bank: Tensor, past_length: Tensor) -> Tensor:
    """Put what a state holds into slots.

    Args:
        layout: of the slots.
        cache: (rows, cache_length, dim), newest last.
        bank: (rows, num_entries, dim), newest last.
        past_length: (rows,) int64, positions read.

    Returns:
        (rows, slots, dim), zero where nothing stands.
    """
    block, position = layout.slot_contents(past_length - 1)
    first_block = layout.num_evicted_blocks(past_length - 1)[:, None] - layout.num_entries
    entries = _gather_or_zero(bank, torch.where(block >= 0, block - first_block, -1))
    states = _gather_or_zero(
        cache, torch.where(position >= 0, position - past_length[:, None] + layout.cache_length, -1)
    )
    return torch.cat([entries, states], dim=1)


def from_ring(layout: RingLayout, hidden: Tensor, past_length: Tensor) -> tuple[Tensor, Tensor]:
    """Return cache and bank of a state from slots: the inverse of :func:`to_ring`."""
    device = hidden.device
    number = (
        layout.num_evicted_blocks(past_length - 1)[:, None]
        - layout.num_entries
        + torch.arange(layout.num_entries, device=device)
    )
    position = past_length[:, None] - layout.cache_length + torch.arange(layout.cache_length, device=device)
    bank = _gather_or_zero(hidden, torch.where(number >= 0, number % max(layout.num_entries, 1), -1))
    cache = _gather_or_zero(
        hidden, torch.where(position >= 0, layout.num_entries + position % layout.num_exact_slots, -1)
    )
    return cache, bank


def _gather_or_zero(source: Tensor, index: Tensor) -> Tensor:
    """Return source (rows, n, dim) at index (rows, m), zero where it is negative."""
    if source.shape[1] == 0:
        return source.new_zeros(*index.shape, source.shape[2])
    taken = source.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, source.shape[2]))
    return taken.masked_fill((index < 0)[..., None], 0.0)
