"""Visibility intervals, and static bounds that never exclude a visible pair."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.ops.attention.mask import (
    KeyRange,
    Visibility,
    compute_key_counts,
    create_mask,
    find_key_ranges,
    num_visible_pairs,
)
from tests.ops.attention.strategies import Problem, problems


@given(problems(), st.integers(0, 60), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_key_ranges_cover_every_visible_pair(problem: Problem, start: int, length: int) -> None:
    visibility = problem.visibility
    start = min(start, visibility.num_queries - 1)
    stop = min(start + length, visibility.num_queries)
    outside = torch.ones(visibility.num_keys, dtype=torch.bool)
    for low, high in find_key_ranges(visibility, start, stop):
        assert low < high
        outside[low:high] = False
    assert not create_mask(visibility, (start, stop))[..., outside].any()


@given(st.integers(0, 30), st.integers(-40, 40), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 50)))
@settings(deadline=None, max_examples=100)
def test_visible_keys_are_the_tightest_range(
    num_keys: int, min_visible_from: int, stride: int, max_span: int | None
) -> None:
    """Key i may become visible at any offset of [start + i stride, start + (i + 1) stride), for up to max_span."""
    key_range = KeyRange(num_keys, min_visible_from, stride, max_span)
    for start, stop in ((0, 1), (0, 16), (16, 23)):
        possible = [
            i
            for i in range(num_keys)
            if any(
                max(visible_from, start) < min(stop, visible_from + max_span if max_span is not None else stop)
                for visible_from in range(min_visible_from + i * stride, min_visible_from + (i + 1) * stride)
            )
        ]
        low, high = key_range.find_visible_keys(start, stop)
        assert set(possible) <= set(range(low, high))
        if possible and max_span:
            # Rounding may add one key at either end.
            assert len(possible) <= high - low <= len(possible) + 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(1, 9), st.integers(0, 30))
def test_groups_of_keys_share_the_bounds_of_one_key(
    num_groups: int, group_size: int, start: int, length: int, max_span: int
) -> None:
    single, grouped = (
        KeyRange(num_groups, -3, 2, max_span),
        KeyRange(num_groups * group_size, -3, 2, max_span, group_size),
    )
    low, high = single.find_visible_keys(start, start + length)
    assert grouped.find_visible_keys(start, start + length) == (low * group_size, high * group_size)


@given(
    st.integers(0, 30), st.integers(-40, 40), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 50)),
    st.integers(1, 5),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_attending_queries_invert_visible_keys(
    num_keys: int, min_visible_from: int, stride: int, max_span: int | None, group_size: int
) -> None:
    """A query sees keys of a block by one method exactly if it attends to the block by the other.

    Empty intervals leave gaps between the queries of consecutive keys, so there one method may return more queries.
    """
    key_range, num_queries = KeyRange(num_keys, min_visible_from, stride, max_span, group_size), 23
    for low in range(0, num_keys, 7):
        high = min(low + 7, num_keys)
        start, stop = key_range.find_attending_queries(low, high, num_queries)
        assert 0 <= start <= stop <= num_queries
        for query in range(num_queries):
            visible = key_range.find_visible_keys(query, query + 1)
            sees, attends = max(low, visible[0]) < min(high, visible[1]), start <= query < stop
            assert attends or not sees
            assert sees or not attends or max_span == 0


@given(problems())
@settings(deadline=None, max_examples=30)
def test_num_visible_pairs_counts_the_mask(problem: Problem) -> None:
    assert torch.equal(num_visible_pairs(problem.visibility), create_mask(problem.visibility).sum((1, 2)))


@given(problems(max_queries=20, patterns=True))
@settings(deadline=None, max_examples=15)
def test_num_visible_pairs_of_a_pattern_is_the_mean_over_heads(problem: Problem) -> None:
    mask = compute_key_counts(problem.visibility) > 0
    assert torch.equal(num_visible_pairs(problem.visibility), mask.sum((2, 3)).double().mean(1).floor().long())


@given(problems(max_queries=9, patterns=True))
@settings(deadline=None, max_examples=30)
def test_a_key_counts_as_documented(problem: Problem) -> None:
    visibility, pattern = problem.visibility, problem.visibility.pattern
    assert pattern is not None
    counts = compute_key_counts(visibility)
    for batch, head, query, key in itertools.product(*map(range, counts.shape)):
        at = lambda tensor, batch=batch, key=key: int(tensor[batch % len(tensor), key])  # noqa: E731
        in_interval = at(visibility.visible_from) <= query < at(visibility.visible_until)
        in_document = at(pattern.document_start) <= query < at(pattern.document_end)
        mentions = 0
        if pattern.random_blocks is not None and key >= pattern.first_key:
            blocks = pattern.random_blocks[head % len(pattern.random_blocks), query // pattern.block_size]
            mentions = in_document * int((blocks == (key - pattern.first_key) // pattern.block_size).sum())
        expected = in_interval + mentions if pattern.count_duplicates else int(in_interval or mentions > 0)
        if pattern.global_queries is not None and query in pattern.global_queries[batch % len(pattern.global_queries)]:
            expected = int(in_interval or in_document)
        assert int(counts[batch, head, query, key]) == expected


def test_longformer_window_and_global_keys_are_intervals() -> None:
    """The window's own copy of a global key is masked."""
    length, window, global_position = 12, 2, 4
    position = torch.arange(length)[None]
    is_global = position == global_position
    start = torch.where(is_global, length, position - window)
    visibility = Visibility(
        torch.cat([torch.zeros(1, 1, dtype=torch.int64), start], 1),
        torch.cat([torch.full((1, 1), length), position + window + 1], 1),
        length,
        (KeyRange(1), KeyRange(length, -window, 1, 2 * window + 1)),
    )
    mask = create_mask(visibility)[0]
    distance = (position[0][:, None] - position[0]).abs()
    assert bool(mask[:, 0].all())
    assert torch.equal(mask[:, 1:], (distance <= window) & ~is_global)
    # The static bounds keep the band: the key ranges of a middle query are the global key and its window.
    assert find_key_ranges(visibility, 6, 7) == [(0, 1), (5, 10)]


def test_mask_of_a_block_is_a_slice_of_the_mask() -> None:
    offset = torch.arange(-3, 9)[None]
    visibility = Visibility(offset, offset + 4, 9, (KeyRange(12, -3, 1, 4),))
    mask = create_mask(visibility)
    assert mask.shape == (1, 9, 12)
    assert torch.equal(create_mask(visibility, (2, 7), (4, 10)), mask[:, 2:7, 4:10])
    assert [int(query_mask.sum()) for query_mask in mask[0]] == [4] * 9
