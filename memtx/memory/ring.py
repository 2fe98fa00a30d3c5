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

from memtx.once import Once
from memtx.ops.visibility import Section, Visibility


@dataclass(frozen=True)
class Layout:
    """What a token sees: the exact slots, and before them the bank's.

    Attributes:
        window: exact positions seen at least.
        rate: positions a compressed entry stands for; 1 where nothing is compressed.
        length: compressed entries kept.
        places: of the cache in the memory's state.
    """

    window: int
    rate: int
    length: int
    places: int

    @property
    def exact(self) -> int:
        """Slots of exact positions."""
        return self.window + self.rate - 1

    @property
    def slots(self) -> int:
        """All slots, the bank's first."""
        return self.length + self.exact

    def whole(self, position: Tensor) -> Tensor:
        """Return how many blocks have crossed the edge when the token at ``position`` is read."""
        return ((position - self.window + 1).clamp(min=-1) // self.rate).clamp(min=0)

    def crosses(self, position: int) -> bool:
        """Return whether the token at ``position`` brings a block across the edge."""
        age = position - self.window + 1
        return self.length > 0 and age >= self.rate and age % self.rate == 0

    def held(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return which (block, position) every slot holds once the token at ``position`` (rows,) is written.

        Returns:
            (rows, length) and (rows, exact) int64, negative where nothing was written yet.
        """
        newest = self.whole(position)[:, None] - 1
        bank = torch.arange(self.length, device=position.device)
        slot = torch.arange(self.exact, device=position.device)
        of_bank = newest - (newest - bank) % self.length if self.length else newest.expand(-1, 0)
        return of_bank, position[:, None] - (position[:, None] - slot) % self.exact


@dataclass
class Ring:
    """One layer's buffers.

    Attributes:
        layout: of the slots.
        hidden: (rows, slots, dim), attention inputs and compressed entries, to be compressed or handed back.
        key_value: (rows, slots, 2, kv_heads, head_dim), keys placed by their positions, and values.
    """

    layout: Layout
    hidden: Tensor
    key_value: Tensor

    def first(self, rows: int) -> Ring:
        """Return the first rows as a ring that writes into this one."""
        return Ring(self.layout, self.hidden[:rows], self.key_value[:rows])

    def grown(self, rows: int) -> Ring:
        """Return a ring of so many rows that begins with this one's; the rest is zero."""
        larger = Ring(
            self.layout,
            self.hidden.new_zeros(rows, *self.hidden.shape[1:]),
            self.key_value.new_zeros(rows, *self.key_value.shape[1:]),
        )
        larger.put(0, self)
        return larger

    def put(self, row: int, other: Ring) -> None:
        """Write another ring's rows over this one's from ``row`` on."""
        for own, new in ((self.hidden, other.hidden), (self.key_value, other.key_value)):
            own[row : row + new.shape[0]] = new

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Write the rows ``sources`` (n,) over the rows ``targets`` (n,), all at once."""
        for own in (self.hidden, self.key_value):
            own[targets] = own[sources]


@dataclass(frozen=True)
class Seen:
    """What the current token means to layers of one layout.

    Attributes:
        slot: (rows,) int64, the exact slot to be written.
        visibility: of the slots, for one query.
        tick: (rows, slots) float64, where each slot's entry stands, the query being at 0.
        block: (rows, rate) int64, the slots of the block that crosses the edge; None where no row's does.
        probe: likewise the slots of the newest positions.
        target: (rows,) int64, the bank's slot for its entry.
        crossing: (rows,) bool, the rows whose block crosses.
        centre: (rows, 1) float64, the position of its entry.
    """

    slot: Tensor
    visibility: Visibility
    tick: Tensor
    block: Tensor | None
    probe: Tensor | None
    target: Tensor
    crossing: Tensor
    centre: Tensor


@dataclass(frozen=True)
class Step(Once):
    """One token a row.

    Attributes:
        position: (rows,) int64, of the token within its document.
        crossing: layouts in which a block of some row crosses the edge now: known to the host, so that the
            other steps need not compress.
    """

    position: Tensor
    crossing: frozenset[Layout]

    def seen(self, layout: Layout) -> Seen:
        """Return what the token means to layers of a layout."""
        return self.once(layout, lambda: self._seen(layout))

    def _seen(self, layout: Layout) -> Seen:
        at, rate, exact = self.position[:, None], layout.rate, layout.exact
        block, position = layout.held(self.position)
        edge = layout.whole(self.position)[:, None] * rate
        visible = torch.cat([block >= 0, (position >= edge) & (position >= 0)], dim=1)
        centre = block.double() * rate + (rate - 1) / 2
        tick = torch.cat([centre, position.double()], dim=1) - at
        born = torch.where(visible, 0, 1)
        crossing = (self.position >= layout.window + rate - 1) & ((self.position - layout.window + 1) % rate == 0)
        newest = layout.whole(self.position) - 1
        source = probe = None
        if layout in self.crossing:
            offset = torch.arange(rate, device=at.device)
            source = layout.length + (at - exact + offset) % exact
            probe = layout.length + (at - rate + 1 + offset) % exact
        return Seen(
            layout.length + self.position % exact,
            Visibility(born, torch.ones_like(born), 1, (Section(layout.slots),)),
            tick,
            source,
            probe,
            newest.clamp(min=0) % max(layout.length, 1),
            crossing,
            newest[:, None].double() * rate + (rate - 1) / 2,
        )


def opened(layout: Layout, cache: Tensor, bank: Tensor, carried: Tensor) -> Tensor:
    """Put what a state holds into slots.

    Args:
        layout: of the slots.
        cache: (rows, places, dim), newest last.
        bank: (rows, length, dim), newest last.
        carried: (rows,) int64, positions read.

    Returns:
        (rows, slots, dim), zero where nothing stands.
    """
    block, position = layout.held(carried - 1)
    first_block = layout.whole(carried - 1)[:, None] - layout.length
    entries = _taken(bank, torch.where(block >= 0, block - first_block, -1))
    states = _taken(cache, torch.where(position >= 0, position - carried[:, None] + layout.places, -1))
    return torch.cat([entries, states], dim=1)


def closed(layout: Layout, hidden: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Return cache and bank of a state from slots: the inverse of :func:`opened`."""
    device = hidden.device
    number = layout.whole(carried - 1)[:, None] - layout.length + torch.arange(layout.length, device=device)
    position = carried[:, None] - layout.places + torch.arange(layout.places, device=device)
    bank = _taken(hidden, torch.where(number >= 0, number % max(layout.length, 1), -1))
    cache = _taken(hidden, torch.where(position >= 0, layout.length + position % layout.exact, -1))
    return cache, bank


def _taken(source: Tensor, index: Tensor) -> Tensor:
    """Return source (rows, n, dim) at index (rows, m), zero where it is negative."""
    if source.shape[1] == 0:
        return source.new_zeros(*index.shape, source.shape[2])
    taken = source.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, source.shape[2]))
    return taken.masked_fill((index < 0)[..., None], 0.0)
