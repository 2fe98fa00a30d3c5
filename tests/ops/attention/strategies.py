"""Random attention problems: key ranges as memories create them, with documents, prefixes and fully masked queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention.bias import AlibiBias, RelativeBias, ScoreBias
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility

FAR = 1 << 40


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    bias: ScoreBias | None
    block_size: int


def sparse_pattern(
    draw: st.DrawFn, visibility: Visibility, batch_size: int, heads: int, generator: torch.Generator
) -> SparsePattern:
    """Draw documents, global queries and random blocks, with duplicates and ignored entries."""
    num_queries, num_keys = visibility.num_queries, visibility.num_keys
    block_size, first_key = draw(st.integers(1, 9)), draw(st.integers(0, num_keys))

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    start = randint(-5, num_queries, draw(st.sampled_from((1, batch_size))), num_keys)
    end = start + randint(0, num_queries + 5, *start.shape)
    if draw(st.booleans()):  # Only documents that span the call, and padding.
        end = torch.where(end - start > 3, start.new_full((), num_queries), 0)
        start = torch.zeros_like(end)
    global_queries = randint(-2, num_queries, draw(st.sampled_from((1, batch_size))), draw(st.integers(1, 4)))
    num_query_blocks = -(-num_queries // block_size)
    random_blocks = randint(-1, num_keys // block_size + 2, draw(st.sampled_from((1, heads))), num_query_blocks, 3)
    parts = draw(st.sampled_from(("queries", "blocks", "both")))
    return SparsePattern(
        start,
        end,
        global_queries if parts != "blocks" else None,
        random_blocks if parts != "queries" else None,
        block_size,
        first_key,
        draw(st.booleans()),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    kv_groups: tuple[int, ...] = (1, 2, 4),
    max_queries: int = 70,
    biases: tuple[str, ...] = ("none", "linear", "relative", "buckets"),
    patterns: bool = False,
    head_dims: tuple[int, ...] = (4, 8, 20),
) -> Problem:
    """Draw a prefix whose keys advance by a stride, then a window; some keys and queries are fully masked."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch_size, queries = draw(st.integers(1, 3)), draw(st.integers(1, max_queries))
    cached = draw(st.integers(0, max_queries))
    window, stride, prefix = draw(st.integers(1, 90)), draw(st.integers(1, 5)), draw(st.integers(0, 40))
    heads, group = 4, draw(st.sampled_from(kv_groups))
    shared = draw(st.booleans())

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    intervals = 1 if shared else batch_size
    regular_start = torch.arange(prefix) * stride - prefix * stride // 2
    prefix_start = regular_start + randint(0, stride, intervals, prefix)
    span = draw(st.integers(0, 60))
    prefix_end = prefix_start + randint(0, span + 1, intervals, prefix)
    offset = torch.arange(-cached, queries).expand(intervals, -1)
    # Documents start anywhere.
    document_start = torch.where(torch.rand(offset.shape, generator=generator) < 0.1, offset, FAR)
    next_start = torch.cat([document_start[:, 1:], torch.full((intervals, 1), FAR)], 1)
    document_end = next_start.flip(1).cummin(1).values.flip(1)
    end = torch.minimum(offset + window, document_end)
    is_masked = torch.rand(offset.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5)))
    end = torch.where(is_masked, -FAR, end)
    if draw(st.integers(0, 5)) == 0:  # All queries are fully masked.
        prefix_end, end = torch.full_like(prefix_end, -FAR), torch.full_like(end, -FAR)
    key_ranges = (
        KeyRange(prefix, -(prefix * stride // 2) if prefix else 0, stride, span),
        KeyRange(cached + queries, -cached, 1, draw(st.sampled_from((window, None)))),
    )
    # A bidirectional window extends as far forward as backward.
    lookahead = draw(st.sampled_from((0, window)))
    if lookahead:
        key_ranges = (key_ranges[0], KeyRange(cached + queries, -cached - lookahead, 1, window + lookahead))
    start = torch.cat([prefix_start, offset - lookahead], 1)
    visibility = Visibility(start, torch.cat([prefix_end, end], 1), queries, key_ranges)
    if patterns:
        pattern = sparse_pattern(draw, visibility, batch_size, heads, generator)
        visibility = replace(visibility, pattern=pattern, _values={})
    head_dim = draw(st.sampled_from(head_dims))
    q, k, v = (
        torch.randn(batch_size, num_heads, length, head_dim, dtype=torch.float64, generator=generator)
        for num_heads, length in (
            (heads, queries),
            (heads // group, visibility.num_keys),
            (heads // group, visibility.num_keys),
        )
    )
    key_offset = visibility.visible_from.clamp(-FAR, queries).double()
    bias: ScoreBias | None = None
    kind = draw(st.sampled_from(biases))
    if kind == "linear":
        bias = AlibiBias(0.5 ** torch.arange(1.0, heads + 1, dtype=torch.float64), key_offset)
    elif kind != "none":
        # Half offsets, as for the center of a block; some distances are beyond both ends of the table.
        key_offset = key_offset + 0.5 * randint(0, 2, *key_offset.shape)
        table = torch.randn(heads, 7, dtype=torch.float64, generator=generator)
        buckets = torch.arange(20).pow(0.5).long() if kind == "buckets" else None
        bias = RelativeBias(table, key_offset, draw(st.integers(-9, 3)), buckets)
    return Problem(q, k, v, visibility, bias, draw(st.sampled_from((1, 7, 16, 128))))
