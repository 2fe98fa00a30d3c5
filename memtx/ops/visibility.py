"""Who sees whom, as two integers a key: the query at tick t sees the key iff ``born <= t < expires``.

Every causal memory is said this way: windows, compressed entries, documents. No backend needs to know a kind
of memory. ``Section`` adds what is known without looking at the numbers, so that a backend can leave out
keys that nobody of a block of queries can see while all shapes stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """Consecutive keys whose births advance steadily, whatever the data.

    Key i of the section is born no earlier than tick ``first + i * stride`` and is gone by tick
    ``first + (i + 1) * stride - 1 + span``.

    Attributes:
        keys: how many keys.
        first: the earliest tick at which key 0 can be born.
        stride: ticks from one key's earliest birth to the next one's.
        span: ticks a key lives at most; None if no bound is known.
    """

    keys: int
    first: int = 0
    stride: int = 0
    span: int | None = None

    def seen(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys that a query with a tick in [start, stop) can see."""
        if self.stride == 0:
            return 0, self.keys
        # Born before stop: first + i * stride < stop.
        high = -((self.first - stop) // self.stride)
        # Alive at start: first + (i + 1) * stride - 1 + span > start.
        low = 0 if self.span is None else (start - self.span + 1 - self.first) // self.stride
        low, high = min(max(low, 0), self.keys), min(max(high, 0), self.keys)
        return low, max(low, high)


@dataclass(frozen=True)
class Visibility:
    """Which of the keys each of the queries at ticks 0 .. queries - 1 sees.

    Attributes:
        born: (rows, keys) int64, the first tick that sees the key; rows may be 1 for all alike.
        expires: (rows, keys) int64, the first tick that does not see it any more.
        queries: how many queries.
        sections: static bounds, in the keys' order; their keys add up to all.
    """

    born: Tensor
    expires: Tensor
    queries: int
    sections: tuple[Section, ...]
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def keys(self) -> int:
        """How many keys."""
        return self.born.shape[1]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, computed once: layers that share this object share masks."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])


def visible(
    visibility: Visibility, queries: tuple[int, int] | None = None, keys: tuple[int, int] | None = None
) -> Tensor:
    """Return who sees whom in a block as (rows, queries, keys) bool; whole by default."""
    start, stop = queries if queries is not None else (0, visibility.queries)
    low, high = keys if keys is not None else (0, visibility.keys)
    tick = torch.arange(start, stop, device=visibility.born.device)[None, :, None]
    born, expires = visibility.born[:, None, low:high], visibility.expires[:, None, low:high]
    return (born <= tick) & (tick < expires)


def pairs(visibility: Visibility) -> Tensor:
    """Return (rows,) int64: the visible pairs of each row, for counting useful operations."""
    first = visibility.born.clamp(0, visibility.queries)
    last = visibility.expires.clamp(0, visibility.queries)
    return (last - first).clamp(min=0).sum(1)


def ranges(visibility: Visibility, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the ranges of keys that queries with ticks in [start, stop) may see, in order, none empty."""
    found, offset = [], 0
    for section in visibility.sections:
        low, high = section.seen(start, stop)
        if high > low:
            found.append((offset + low, offset + high))
        offset += section.keys
    return found
