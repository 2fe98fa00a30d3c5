"""The table of blocks that flex_attention visits: all that may be seen, made once a shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.ops.attention import flex
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask
from tests.ops.attention.strategies import Problem, problems


@given(problems(most=400, biases=("none",)))
@settings(deadline=None, max_examples=25)
def test_no_visible_pair_is_left_out(problem: Problem) -> None:
    seen = problem.visibility
    table = flex.create_static_block_mask(seen.key_ranges, seen.num_queries, torch.device("cpu")).to_dense()[0, 0]
    query, key = create_mask(seen).any(0).nonzero().unbind(1)
    assert bool(table[query // flex.BLOCK_SIZE, key // flex.BLOCK_SIZE].all())


@given(st.integers(1, 2000))
@settings(deadline=None, max_examples=15)
def test_a_window_visits_a_band(queries: int) -> None:
    table = flex.create_static_block_mask((KeyRange(queries, 0, 1, 200),), queries, torch.device("cpu")).to_dense()
    # A block of 128 queries and the 199 ticks before it touch at most four blocks of keys.
    assert int(table.sum(-1).max()) <= 4


def test_nothing_is_made_anew_as_lifetimes_change() -> None:
    flex.create_static_block_mask.cache_clear()
    for filled in range(5):
        tick = torch.arange(-200, 100)[None]
        expires = torch.where(tick >= -filled, tick + 200, -1)
        seen = Visibility(tick, expires, 100, (KeyRange(300, -200, 1, 200),))
        mask = flex._create_block_mask(seen, 2)
        at = (torch.tensor(1), torch.tensor(0), torch.tensor(0), torch.tensor(199))
        assert bool(mask.mask_mod(*at)) == (filled >= 1)  # each call's mask reads its own lifetimes
    assert flex.create_static_block_mask.cache_info().misses == 1
