"""The block mask of flex_attention: it covers all visible pairs and is cached by shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.ops.attention import flex
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask
from tests.ops.attention.strategies import Problem, problems


@given(problems(max_queries=400, biases=("none",)))
@settings(deadline=None, max_examples=25)
def test_block_mask_covers_every_visible_pair(problem: Problem) -> None:
    visibility = problem.visibility
    block_mask = flex.create_static_block_mask(visibility.key_ranges, visibility.num_queries, torch.device("cpu"))
    query, key = create_mask(visibility).any(0).nonzero().unbind(1)
    assert bool(block_mask.to_dense()[0, 0][query // flex.BLOCK_SIZE, key // flex.BLOCK_SIZE].all())


@given(st.integers(1, 2000))
@settings(deadline=None, max_examples=15)
def test_window_visits_a_band_of_blocks(queries: int) -> None:
    block_mask = flex.create_static_block_mask((KeyRange(queries, 0, 1, 200),), queries, torch.device("cpu"))
    # A block of 128 queries and the 199 tokens before it touch at most four blocks of keys.
    assert int(block_mask.to_dense().sum(-1).max()) <= 4


def test_block_mask_is_built_once_while_intervals_change() -> None:
    flex.create_static_block_mask.cache_clear()
    for filled in range(5):
        offset = torch.arange(-200, 100)[None]
        end = torch.where(offset >= -filled, offset + 200, -1)
        visibility = Visibility(offset, end, 100, (KeyRange(300, -200, 1, 200),))
        block_mask = flex._create_block_mask(visibility, 2)
        pair = (torch.tensor(1), torch.tensor(0), torch.tensor(0), torch.tensor(199))
        assert bool(block_mask.mask_mod(*pair)) == (filled >= 1)  # Each call's mask reads its own intervals.
    assert flex.create_static_block_mask.cache_info().misses == 1
