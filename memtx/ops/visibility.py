"""Who sees whom, as two integers a key: the query at tick t sees the key iff ``born <= t < expires``.

Every causal memory is said this way: windows, compressed entries, documents; so are bidirectional windows (born
before the key's own tick) and global keys (visible through their whole document). No backend needs to know a kind
of memory. ``Section`` adds what is known without looking at the numbers, so that a backend can leave out
keys that nobody of a block of queries can see while all shapes stay fixed. ``Pattern`` adds the two things that
no lifetime can say: global queries and random blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.once import Once


@dataclass(frozen=True)
class Section:
    """Consecutive keys whose births advance steadily, whatever the data.

    Key i of the section is born no earlier than tick ``first + b * stride`` and is gone by tick
    ``first + (b + 1) * stride - 1 + span``, where b is ``i // grain``.

    Attributes:
        keys: how many keys.
        first: the earliest tick at which key 0 can be born.
        stride: ticks from the earliest birth of one key (of one group) to the next one's; 0 if nothing is known.
        span: ticks a key lives at most; None if no bound is known.
        grain: keys a group: those of equal bounds.
    """

    keys: int
    first: int = 0
    stride: int = 0
    span: int | None = None
    grain: int = 1

    def seen(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys that a query with a tick in [start, stop) can see."""
        if self.stride == 0:
            return 0, self.keys
        # Born before stop: first + i * stride < stop.
        high = -((self.first - stop) // self.stride)
        # Alive at start: first + (i + 1) * stride - 1 + span > start.
        low = 0 if self.span is None else (start - self.span + 1 - self.first) // self.stride
        low, high = low * self.grain, high * self.grain
        low, high = min(max(low, 0), self.keys), min(max(high, 0), self.keys)
        return low, max(low, high)

    def seeing(self, low: int, high: int, queries: int) -> tuple[int, int]:
        """Return the range of the ticks 0 .. queries - 1 whose queries can see one of the keys [low, high)."""
        if self.stride == 0:
            return 0, queries
        low, high = low // self.grain, -(-high // self.grain)
        start = min(max(self.first + low * self.stride, 0), queries)
        if self.span is None:
            return start, queries
        return start, min(max(self.first + high * self.stride - 1 + self.span, start), queries)


@dataclass(frozen=True, eq=False)
class Pattern:
    """Pairs seen beside those of the lifetimes, within documents; a key seen both ways counts once by default.

    Longformer (Beltagy et al. 2020, section 3.1) and Big Bird (Zaheer et al. 2020, section 2).

    Attributes:
        begins: (rows, keys) int64, the tick at which the key's document begins; rows may be 1.
        ends: (rows, keys) int64, the tick at which it ends; ``begins`` for a key not to be seen, such as padding.
        queries: (rows, n) int64, ticks of global queries, which see every key of their document; negative for
            none. None where there are none.
        blocks: (1 or heads, query blocks, r) int64, the blocks of keys that each block of queries sees as well;
            negative for none. None where there are none.
        size: queries, and keys, a block.
        first: the key at which block 0 of the keys begins, such as the number of global keys before them.
        repeats: whether a key counts as often as it is seen, by a lifetime and by each mention of its block, as in
            the published Big Bird; a global query still counts every key once.
    """

    begins: Tensor
    ends: Tensor
    queries: Tensor | None = None
    blocks: Tensor | None = None
    size: int = 64
    first: int = 0
    repeats: bool = False


@dataclass(frozen=True)
class Visibility(Once):
    """Which of the keys each of the queries at ticks 0 .. queries - 1 sees.

    Attributes:
        born: (rows, keys) int64, the first tick that sees the key; rows may be 1 for all alike.
        expires: (rows, keys) int64, the first tick that does not see it any more.
        queries: how many queries.
        sections: static bounds, in the keys' order; their keys add up to all.
        pattern: pairs that are seen as well.
    """

    born: Tensor
    expires: Tensor
    queries: int
    sections: tuple[Section, ...]
    pattern: Pattern | None = None

    @property
    def keys(self) -> int:
        """How many keys."""
        return self.born.shape[1]


def parted(visibility: Visibility) -> tuple[Visibility, Visibility]:
    """Return who sees whom of the keys in the first section, and of the others; made once."""

    def make() -> tuple[Visibility, Visibility]:
        assert visibility.pattern is None, "a pattern is of all keys"
        first, *rest = visibility.sections
        born, expires, n = visibility.born, visibility.expires, first.keys
        return (
            Visibility(born[:, :n], expires[:, :n], visibility.queries, (first,)),
            Visibility(born[:, n:], expires[:, n:], visibility.queries, tuple(rest)),
        )

    return visibility.once("parted", make)


def visible(
    visibility: Visibility, queries: tuple[int, int] | None = None, keys: tuple[int, int] | None = None
) -> Tensor:
    """Return who sees whom by lifetimes alone in a block, (rows, queries, keys) bool; whole by default."""
    start, stop = queries if queries is not None else (0, visibility.queries)
    low, high = keys if keys is not None else (0, visibility.keys)
    tick = torch.arange(start, stop, device=visibility.born.device)[None, :, None]
    born, expires = visibility.born[:, None, low:high], visibility.expires[:, None, low:high]
    return (born <= tick) & (tick < expires)


def visible_by_head(visibility: Visibility) -> Tensor:
    """Return who sees whom, the pattern included: (rows, 1 or heads, queries, keys) bool."""
    return times_seen(visibility) > 0


def times_seen(visibility: Visibility) -> Tensor:
    """Return how often each key counts for each query, (rows, 1 or heads, queries, keys) int64."""
    seen = visible(visibility)[:, None]
    pattern = visibility.pattern
    if pattern is None:
        return seen.long()
    tick = torch.arange(visibility.queries, device=seen.device)
    document = (pattern.begins[:, None] <= tick[:, None]) & (tick[:, None] < pattern.ends[:, None])
    times = seen.long()
    if pattern.blocks is not None:
        key = torch.arange(visibility.keys, device=seen.device) - pattern.first
        block = torch.where(key >= 0, key // pattern.size, -1)
        for chosen in pattern.blocks[:, tick // pattern.size].unbind(-1):  # (1 or heads, queries)
            mentioned = (chosen[..., None] == block) & (block >= 0) & document[:, None]
            times = times + mentioned.long()
    if not pattern.repeats:
        times = times.clamp(max=1)
    if pattern.queries is not None:
        asks = (pattern.queries[:, None] == tick[:, None]).any(-1)[:, None, :, None]
        times = torch.where(asks, (seen | document[:, None]).long(), times)
    return times


def pairs(visibility: Visibility) -> Tensor:
    """Return (rows,) int64: the visible pairs of each row, for counting useful operations.

    Where heads see different blocks it is the mean of the heads, rounded down.
    """
    if visibility.pattern is not None:
        seen = visible_by_head(visibility)
        return seen.sum((1, 2, 3)) // seen.shape[1]
    first = visibility.born.clamp(0, visibility.queries)
    last = visibility.expires.clamp(0, visibility.queries)
    return (last - first).clamp(min=0).sum(1)


def ranges(visibility: Visibility, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the ranges of keys that queries with ticks in [start, stop) may see by lifetimes, in order, none empty."""
    found, offset = [], 0
    for section in visibility.sections:
        low, high = section.seen(start, stop)
        if high > low:
            found.append((offset + low, offset + high))
        offset += section.keys
    return found
