"""Who sees whom, as two integers a key: the query at tick t sees the key iff ``visible_from <= t < visible_until``.

Every causal memory is said this way: windows, compressed entries, documents; so are bidirectional windows (born
before the key's own tick) and global keys (visible through their whole document). No backend needs to know a kind
of memory. ``KeyRange`` adds what is known without looking at the numbers, so that a backend can leave out
keys that nobody of a block of queries can see while all shapes stay fixed. ``SparsePattern`` adds the two things that
no lifetime can say: global queries and random blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.memo import Memo


@dataclass(frozen=True)
class KeyRange:
    """Consecutive keys whose births advance steadily, whatever the data.

    Key i of the range is born no earlier than tick ``min_visible_from + b * stride`` and is gone by tick
    ``min_visible_from + (b + 1) * stride - 1 + max_span``, where b is ``i // group_size``.

    Attributes:
        num_keys: how many keys.
        min_visible_from: the earliest tick at which key 0 can be born.
        stride: ticks from the earliest birth of one key (of one group) to the next one's; 0 if nothing is known.
        max_span: ticks a key lives at most; None if no bound is known.
        group_size: keys a group: those of equal bounds.
    """

    num_keys: int
    min_visible_from: int = 0
    stride: int = 0
    max_span: int | None = None
    group_size: int = 1

    def find_visible_keys(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys that a query with a tick in [start, stop) can see."""
        if self.stride == 0:
            return 0, self.num_keys
        # Born before stop: min_visible_from + i * stride < stop.
        high = -((self.min_visible_from - stop) // self.stride)
        # Alive at start: min_visible_from + (i + 1) * stride - 1 + max_span > start.
        low = 0 if self.max_span is None else (start - self.max_span + 1 - self.min_visible_from) // self.stride
        low, high = low * self.group_size, high * self.group_size
        low, high = min(max(low, 0), self.num_keys), min(max(high, 0), self.num_keys)
        return low, max(low, high)

    def find_attending_queries(self, low: int, high: int, num_queries: int) -> tuple[int, int]:
        """Return the range of the ticks 0 .. num_queries - 1 whose queries can see one of the keys [low, high)."""
        if self.stride == 0:
            return 0, num_queries
        low, high = low // self.group_size, -(-high // self.group_size)
        start = min(max(self.min_visible_from + low * self.stride, 0), num_queries)
        if self.max_span is None:
            return start, num_queries
        return start, min(max(self.min_visible_from + high * self.stride - 1 + self.max_span, start), num_queries)


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """Pairs seen beside those of the lifetimes, within documents; a key seen both ways counts once by default.

    Longformer (Beltagy et al. 2020, section 3.1) and Big Bird (Zaheer et al. 2020, section 2).

    Attributes:
        document_start: (rows, keys) int64, the tick at which the key's document begins; rows may be 1.
        document_end: (rows, keys) int64, the tick at which it ends; ``document_start`` for a key not to be seen, such
            as padding.
        global_queries: (rows, n) int64, ticks of global queries, which see every key of their document; negative for
            none. None where there are none.
        random_blocks: (1 or heads, query blocks, r) int64, the blocks of keys that each block of queries sees as well;
            negative for none. None where there are none.
        block_size: queries, and keys, a block.
        first_key: the key at which block 0 of the keys begins, such as the number of global keys before them.
        count_duplicates: whether a key counts as often as it is seen, by a lifetime and by each mention of its block,
            as in the published Big Bird; a global query still counts every key once.
    """

    document_start: Tensor
    document_end: Tensor
    global_queries: Tensor | None = None
    random_blocks: Tensor | None = None
    block_size: int = 64
    first_key: int = 0
    count_duplicates: bool = False


@dataclass(frozen=True)
class Visibility(Memo):
    """Which of the keys each of the queries at ticks 0 .. num_queries - 1 sees.

    Attributes:
        visible_from: (rows, keys) int64, the first tick that sees the key; rows may be 1 for all alike.
        visible_until: (rows, keys) int64, the first tick that does not see it any more.
        num_queries: how many queries.
        key_ranges: static bounds, in the keys' order; their keys add up to all.
        pattern: pairs that are seen as well.
    """

    visible_from: Tensor
    visible_until: Tensor
    num_queries: int
    key_ranges: tuple[KeyRange, ...]
    pattern: SparsePattern | None = None

    @property
    def num_keys(self) -> int:
        """How many keys."""
        return self.visible_from.shape[1]


def split_bank(visibility: Visibility) -> tuple[Visibility, Visibility]:
    """Return who sees whom of the keys in the first range, and of the others; made once."""

    def make() -> tuple[Visibility, Visibility]:
        assert visibility.pattern is None, "a pattern is of all keys"
        first, *rest = visibility.key_ranges
        born, expires, n = visibility.visible_from, visibility.visible_until, first.num_keys
        return (
            Visibility(born[:, :n], expires[:, :n], visibility.num_queries, (first,)),
            Visibility(born[:, n:], expires[:, n:], visibility.num_queries, tuple(rest)),
        )

    return visibility.memo("split_bank", make)


def create_mask(
    visibility: Visibility, query_range: tuple[int, int] | None = None, key_range: tuple[int, int] | None = None
) -> Tensor:
    """Return who sees whom by lifetimes alone in a block, (rows, queries, keys) bool; whole by default."""
    start, stop = query_range if query_range is not None else (0, visibility.num_queries)
    low, high = key_range if key_range is not None else (0, visibility.num_keys)
    tick = torch.arange(start, stop, device=visibility.visible_from.device)[None, :, None]
    born, expires = visibility.visible_from[:, None, low:high], visibility.visible_until[:, None, low:high]
    return (born <= tick) & (tick < expires)


def create_head_mask(visibility: Visibility) -> Tensor:
    """Return who sees whom, the pattern included: (rows, 1 or heads, queries, keys) bool."""
    return compute_key_counts(visibility) > 0


def compute_key_counts(visibility: Visibility) -> Tensor:
    """Return how often each key counts for each query, (rows, 1 or heads, queries, keys) int64."""
    seen = create_mask(visibility)[:, None]
    pattern = visibility.pattern
    if pattern is None:
        return seen.long()
    tick = torch.arange(visibility.num_queries, device=seen.device)
    document = (pattern.document_start[:, None] <= tick[:, None]) & (tick[:, None] < pattern.document_end[:, None])
    times = seen.long()
    if pattern.random_blocks is not None:
        key = torch.arange(visibility.num_keys, device=seen.device) - pattern.first_key
        block = torch.where(key >= 0, key // pattern.block_size, -1)
        for chosen in pattern.random_blocks[:, tick // pattern.block_size].unbind(-1):  # (1 or heads, queries)
            mentioned = (chosen[..., None] == block) & (block >= 0) & document[:, None]
            times = times + mentioned.long()
    if not pattern.count_duplicates:
        times = times.clamp(max=1)
    if pattern.global_queries is not None:
        asks = (pattern.global_queries[:, None] == tick[:, None]).any(-1)[:, None, :, None]
        times = torch.where(asks, (seen | document[:, None]).long(), times)
    return times


def num_visible_pairs(visibility: Visibility) -> Tensor:
    """Return (rows,) int64: the visible pairs of each row, for counting useful operations.

    Where heads see different blocks it is the mean of the heads, rounded down.
    """
    if visibility.pattern is not None:
        seen = create_head_mask(visibility)
        return seen.sum((1, 2, 3)) // seen.shape[1]
    first = visibility.visible_from.clamp(0, visibility.num_queries)
    last = visibility.visible_until.clamp(0, visibility.num_queries)
    return (last - first).clamp(min=0).sum(1)


def find_key_ranges(visibility: Visibility, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the ranges of keys that queries with ticks in [start, stop) may see by lifetimes, in order, none empty."""
    found, offset = [], 0
    for section in visibility.key_ranges:
        low, high = section.find_visible_keys(start, stop)
        if high > low:
            found.append((offset + low, offset + high))
        offset += section.num_keys
    return found
