"""Visibility as two integers per key: the query at offset t sees a key iff visible_from <= t < visible_until.

These intervals express every causal memory (windows, compressed entries, documents), bidirectional windows (visible
before the key's own offset) and global keys (visible to their whole document), so backends know nothing of memories.
:class:`KeyRange` adds static bounds, by which a backend skips keys that no query of a block can see while all shapes
stay fixed. :class:`SparsePattern` adds what intervals cannot express: global queries and random blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from memtx.memo import Memo

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class KeyRange:
    """Consecutive keys whose intervals advance by a fixed stride, independent of the data.

    With b = i // group_size, key i of the range becomes visible no earlier than offset
    ``min_visible_from + b * stride`` and stops no later than ``min_visible_from + (b + 1) * stride - 1 + max_span``.

    Attributes:
        min_visible_from: Earliest offset at which key 0 can become visible.
        stride: Distance between the bounds of consecutive groups. 0 if no bound is known.
        max_span: Maximum length of an interval. None if no bound is known.
        group_size: Number of consecutive keys that share a bound.
    """

    num_keys: int
    min_visible_from: int = 0
    stride: int = 0
    max_span: int | None = None
    group_size: int = 1

    def find_visible_keys(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of keys that queries at offsets [start, stop) can see."""
        if self.stride == 0:
            return 0, self.num_keys
        # Visible before stop: min_visible_from + b * stride < stop.
        high = -((self.min_visible_from - stop) // self.stride)
        # Visible at start: min_visible_from + (b + 1) * stride - 1 + max_span > start.
        low = 0 if self.max_span is None else (start - self.max_span + 1 - self.min_visible_from) // self.stride
        low, high = low * self.group_size, high * self.group_size
        low, high = min(max(low, 0), self.num_keys), min(max(high, 0), self.num_keys)
        return low, max(low, high)

    def find_attending_queries(self, low: int, high: int, num_queries: int) -> tuple[int, int]:
        """Return the range of queries from 0 to num_queries - 1 that can see any of the keys [low, high)."""
        if self.stride == 0:
            return 0, num_queries
        low, high = low // self.group_size, -(-high // self.group_size)
        start = min(max(self.min_visible_from + low * self.stride, 0), num_queries)
        if self.max_span is None:
            return start, num_queries
        return start, min(max(self.min_visible_from + high * self.stride - 1 + self.max_span, start), num_queries)


def find_key_bounds(key_ranges: Sequence[KeyRange], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the keys [low, high) of each key range that queries at offsets [start, stop) can see."""
    bounds, first_key = [], 0
    for key_range in key_ranges:
        low, high = key_range.find_visible_keys(start, stop)
        bounds.append((first_key + low, first_key + high))
        first_key += key_range.num_keys
    return bounds


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """Additional visible pairs within documents; by default, a pair that an interval contains counts once.

    Longformer (Beltagy et al. 2020, section 3.1) and Big Bird (Zaheer et al. 2020, section 2).

    Attributes:
        document_start: ``(batch or 1, keys)`` int64, offset at which the key's document starts.
        document_end: ``(batch or 1, keys)`` int64, offset at which it ends; equal to ``document_start`` for keys to
            mask, such as padding.
        global_queries: ``(batch or 1, n)`` int64, offsets of the queries that see every key of their document;
            negative entries are ignored. None disables global queries.
        random_blocks: ``(heads or 1, query blocks, r)`` int64, additional key blocks of each query block; negative
            entries are ignored. None disables random blocks.
        block_size: Number of queries, and of keys, per block.
        first_key: Index of the first key of key block 0, such as the number of global keys before it.
        count_duplicates: If True, a key counts once for its interval and once per mention of its block, as in the
            published Big Bird; global queries still count every key once.
    """

    document_start: Tensor
    document_end: Tensor
    global_queries: Tensor | None = None
    random_blocks: Tensor | None = None
    block_size: int = 64
    first_key: int = 0
    count_duplicates: bool = False


@dataclass(frozen=True)
class DilatedWindow:
    """A causal window whose heads see positions at equal distances (Beltagy et al. 2020, section 3.1).

    Attributes:
        size: Positions that each head sees, the query's own included.
        distances: Distances between the positions that the last heads see, one per head.
        default_distance: Distance of the heads before these.
    """

    size: int
    distances: tuple[int, ...] = ()
    default_distance: int = 1

    @property
    def length(self) -> int:
        """Number of positions from the first that any head sees to the query."""
        return (self.size - 1) * max((self.default_distance, *self.distances)) + 1

    def by_head(self, heads: int) -> tuple[int, ...]:
        """Return the distance of each head."""
        return (self.default_distance,) * (heads - len(self.distances)) + self.distances


@dataclass(frozen=True)
class Visibility(Memo):
    """Visible keys of the queries at offsets 0 to num_queries - 1.

    Attributes:
        visible_from: ``(batch or 1, keys)`` int64, offset from which the key is visible.
        visible_until: ``(batch or 1, keys)`` int64, offset from which it is no longer visible.
        key_ranges: Static bounds in key order; their ``num_keys`` sum to the number of keys.
        pattern: Additional visible pairs.
        dilated: Window that limits the intervals by head. Then the keys have consecutive offsets, ``visible_from``,
            which end at the last query's. None if all heads see the same.
    """

    visible_from: Tensor
    visible_until: Tensor
    num_queries: int
    key_ranges: tuple[KeyRange, ...]
    pattern: SparsePattern | None = None
    dilated: DilatedWindow | None = None

    @property
    def num_keys(self) -> int:
        """Number of keys."""
        return self.visible_from.shape[1]


@dataclass(frozen=True)
class BankSplit:
    """Visibility in two parts, of what lies beyond the exact window and of the window; a query sees a key in one.

    Attributes:
        bank: Visibility of the first keys.
        exact: Visibility of the last keys, which may overlap with the first.
    """

    bank: Visibility
    exact: Visibility

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of both parts in x ``(batch, heads, keys, head_dim)``."""
        num_first, num_last = self.bank.num_keys, self.exact.num_keys
        if num_first + num_last == x.shape[2]:
            # The gradient is one concatenation; slices would each fill a tensor of all keys.
            first, last = torch.split(x, [num_first, num_last], dim=2)
            return first, last
        return x[:, :, :num_first], x[:, :, x.shape[2] - num_last :]


def split_bank(visibility: Visibility) -> BankSplit:
    """Split into the visibility of the first key range and that of all others."""

    def split() -> BankSplit:
        assert visibility.pattern is None, "a pattern covers all keys"
        key_ranges, queries = visibility.key_ranges, visibility.num_queries
        start, end, n = visibility.visible_from, visibility.visible_until, key_ranges[0].num_keys
        bank = Visibility(start[:, :n], end[:, :n], queries, key_ranges[:1])
        return BankSplit(bank, Visibility(start[:, n:], end[:, n:], queries, key_ranges[1:]))

    return visibility.memo("split_bank", split)


def is_inside(offset: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return ``start <= offset < end``, broadcast."""
    return (start <= offset) & (offset < end)


def create_mask(
    visibility: Visibility, query_range: tuple[int, int] | None = None, key_range: tuple[int, int] | None = None
) -> Tensor:
    """Return the mask of the intervals, ``(batch or 1, queries, keys)`` bool, for ranges of queries and keys."""
    start, stop = query_range or (0, visibility.num_queries)
    low, high = key_range or (0, visibility.num_keys)
    offset = torch.arange(start, stop, device=visibility.visible_from.device)[None, :, None]
    return is_inside(offset, visibility.visible_from[:, None, low:high], visibility.visible_until[:, None, low:high])


def compute_key_counts(visibility: Visibility, heads: int = 1) -> Tensor:
    """Return how often each key counts for each query, ``(batch or 1, heads or 1, queries, keys)`` int64."""
    visible = create_mask(visibility)[:, None]
    counts = visible.long()
    if (dilated := visibility.dilated) is not None:
        offset = torch.arange(visibility.num_queries, device=visible.device)
        age = (offset[:, None] - visibility.visible_from[:, None])[:, None]
        distance = torch.tensor(dilated.by_head(heads), device=visible.device)[:, None, None]
        counts = counts * ((age % distance == 0) & (age < dilated.size * distance)).long()
    pattern = visibility.pattern
    if pattern is None:
        return counts
    offset = torch.arange(visibility.num_queries, device=visible.device)
    in_document = is_inside(offset[:, None], pattern.document_start[:, None], pattern.document_end[:, None])[:, None]
    if pattern.random_blocks is not None:
        key = torch.arange(visibility.num_keys, device=visible.device) - pattern.first_key
        block = torch.where(key >= 0, key // pattern.block_size, -1)
        for random_block in pattern.random_blocks[:, offset // pattern.block_size].unbind(-1):  # (heads or 1, queries)
            counts = counts + ((random_block[..., None] == block) & (block >= 0) & in_document).long()
    if not pattern.count_duplicates:
        counts = counts.clamp(max=1)
    if pattern.global_queries is not None:
        is_global = (pattern.global_queries[:, None] == offset[:, None]).any(-1)[:, None, :, None]
        counts = torch.where(is_global, (visible | in_document).long(), counts)
    return counts


def num_visible_pairs(visibility: Visibility, heads: int = 1) -> Tensor:
    """Return the number of visible pairs, ``(batch or 1,)`` int64; the mean over heads if they differ."""
    if visibility.pattern is not None or visibility.dilated is not None:
        mask = compute_key_counts(visibility, heads) > 0
        return mask.sum((1, 2, 3)) // mask.shape[1]
    first = visibility.visible_from.clamp(0, visibility.num_queries)
    last = visibility.visible_until.clamp(0, visibility.num_queries)
    return (last - first).clamp(min=0).sum(1)


def find_key_ranges(visibility: Visibility, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the non-empty ranges of keys that queries at offsets [start, stop) may see by intervals, in order."""
    return [(low, high) for low, high in find_key_bounds(visibility.key_ranges, start, stop) if high > low]


def flatten_key_ranges(key_ranges: Sequence[KeyRange]) -> list[int]:
    """Return five integers per key range, in which a custom operator takes them.

    As integers, a model with varying lengths is compiled once, and tables of bounds are built outside the graph.
    """
    flat: list[int] = []
    for key_range in key_ranges:
        max_span = -1 if key_range.max_span is None else key_range.max_span
        interval = (key_range.min_visible_from, key_range.stride, max_span)
        flat += (key_range.num_keys, *interval, key_range.group_size)
    return flat


def unflatten_key_ranges(flat: Sequence[int]) -> tuple[KeyRange, ...]:
    """Return the key ranges of :func:`flatten_key_ranges`."""
    return tuple(
        KeyRange(num_keys, min_visible_from, stride, None if max_span < 0 else max_span, group_size)
        for num_keys, min_visible_from, stride, max_span, group_size in zip(*[iter(flat)] * 5, strict=True)
    )


@lru_cache(maxsize=64)
def build_key_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return ``(query blocks, key ranges, 2)`` int32: the keys [low, high) that each block of queries may see."""
    block_starts = range(0, num_queries, block_size)
    table = [find_key_bounds(key_ranges, start, min(start + block_size, num_queries)) for start in block_starts]
    return torch.tensor(table, dtype=torch.int32).view(-1, len(key_ranges), 2).to(device)


@lru_cache(maxsize=64)
def build_query_bounds(
    key_ranges: tuple[KeyRange, ...], num_queries: int, block_size: int, device: torch.device
) -> Tensor:
    """Return ``(key blocks, 4)`` int32: keys [low, high) of one key range, and the queries [start, stop) they meet."""
    table, first_key = [], 0
    for key_range in key_ranges:
        for low in range(0, key_range.num_keys, block_size):
            high = min(low + block_size, key_range.num_keys)
            queries = key_range.find_attending_queries(low, high, num_queries)
            table.append((first_key + low, first_key + high, *queries))
        first_key += key_range.num_keys
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device)


def get_int32_bounds(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Return both ends of the intervals as ``(batch or 1, keys)`` int32; offsets of a call are far below 2^31."""

    def convert(bound: Tensor) -> Tensor:
        return bound.clamp(-INT32_MAX, INT32_MAX).to(torch.int32).contiguous()

    start, end = visibility.visible_from, visibility.visible_until
    return visibility.memo("int32_bounds", lambda: (convert(start), convert(end)))
