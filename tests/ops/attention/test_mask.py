"""Lifetimes, and the static bounds that let a backend leave keys out: they never leave out a visible pair."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.ops.attention.mask import (
    KeyRange,
    Visibility,
    create_head_mask,
    create_mask,
    find_key_ranges,
    num_visible_pairs,
)
from tests.ops.attention.strategies import Problem, problems


@given(problems(), st.integers(0, 60), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_ranges_hold_every_visible_pair(problem: Problem, start: int, length: int) -> None:
    seen = problem.visibility
    start = min(start, seen.num_queries - 1)
    stop = min(start + length, seen.num_queries)
    found = find_key_ranges(seen, start, stop)
    outside = torch.ones(seen.num_keys, dtype=torch.bool)
    for low, high in found:
        assert low < high
        outside[low:high] = False
    assert not create_mask(seen, (start, stop))[..., outside].any()


@given(st.integers(0, 30), st.integers(-40, 40), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 50)))
@settings(deadline=None, max_examples=100)
def test_section_is_the_tightest_range_of_its_bound(keys: int, first: int, stride: int, span: int | None) -> None:
    """Key i may be born at any tick of [first + i stride, first + (i + 1) stride) and live up to span ticks."""
    section = KeyRange(keys, first, stride, span)
    for start, stop in ((0, 1), (0, 16), (16, 23)):
        possible = [
            i
            for i in range(keys)
            if any(
                max(born, start) < min(stop, born + span if span is not None else stop)
                for born in range(first + i * stride, first + (i + 1) * stride)
            )
        ]
        low, high = section.find_visible_keys(start, stop)
        assert set(possible) <= set(range(low, high))
        if possible and span:
            # One key more at either end may be let in by rounding, no more.
            assert len(possible) <= high - low <= len(possible) + 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(1, 9), st.integers(0, 30))
def test_groups_of_keys_have_the_bounds_of_one(groups: int, grain: int, start: int, length: int, span: int) -> None:
    alone, together = KeyRange(groups, -3, 2, span), KeyRange(groups * grain, -3, 2, span, grain)
    low, high = alone.find_visible_keys(start, start + length)
    assert together.find_visible_keys(start, start + length) == (low * grain, high * grain)


@given(
    st.integers(0, 30), st.integers(-40, 40), st.integers(0, 6), st.one_of(st.none(), st.integers(0, 50)),
    st.integers(1, 5),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_seeing_is_seen_from_the_keys(keys: int, first: int, stride: int, span: int | None, grain: int) -> None:
    """A query sees into a block of keys by the one exactly if the block is seen by it by the other."""
    section, queries = KeyRange(keys, first, stride, span, grain), 23
    for low in range(0, keys, 7):
        high = min(low + 7, keys)
        start, stop = section.find_attending_queries(low, high, queries)
        assert 0 <= start <= stop <= queries
        for tick in range(queries):
            seen = section.find_visible_keys(tick, tick + 1)
            assert (max(low, seen[0]) < min(high, seen[1])) == (start <= tick < stop)


@given(problems())
@settings(deadline=None, max_examples=30)
def test_pairs_count_what_is_visible(problem: Problem) -> None:
    assert torch.equal(num_visible_pairs(problem.visibility), create_mask(problem.visibility).sum((1, 2)))


@given(problems(most=20, patterns=True))
@settings(deadline=None, max_examples=15)
def test_pairs_of_a_pattern(problem: Problem) -> None:
    seen = create_head_mask(problem.visibility)
    assert torch.equal(num_visible_pairs(problem.visibility), seen.sum((2, 3)).double().mean(1).floor().long())


def test_longformer() -> None:
    """A bidirectional window and global keys are lifetimes; the window's own copy of a global key is blind."""
    length, window, marked = 12, 2, 4
    position = torch.arange(length)[None]
    away = position == marked
    born = torch.where(away, length, position - window)
    seen = Visibility(
        torch.cat([torch.zeros(1, 1, dtype=torch.int64), born], 1),
        torch.cat([torch.full((1, 1), length), position + window + 1], 1),
        length,
        (KeyRange(1), KeyRange(length, -window, 1, 2 * window + 1)),
    )
    mask = create_mask(seen)[0]
    distance = (position[0][:, None] - position[0]).abs()
    assert bool(mask[:, 0].all())
    assert torch.equal(mask[:, 1:], (distance <= window) & ~away)
    # The static bounds keep the band: ranges() of a middle query is the global key and its window.
    assert find_key_ranges(seen, 6, 7) == [(0, 1), (5, 10)]


def test_blocks_of_the_mask_are_the_mask() -> None:
    tick = torch.arange(-3, 9)[None]
    seen = Visibility(tick, tick + 4, 9, (KeyRange(12, -3, 1, 4),))
    whole = create_mask(seen)
    assert whole.shape == (1, 9, 12)
    assert torch.equal(create_mask(seen, (2, 7), (4, 10)), whole[:, 2:7, 4:10])
    assert [int(row.sum()) for row in whole[0]] == [4] * 9
