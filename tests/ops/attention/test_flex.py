"""The block mask of flex_attention: it covers all visible pairs and is cached by shape."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from memtx.ops.attention import flex, reference
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


def test_lengths_share_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty lengths compile a kernel per bucket; the limit of torch, eight, would leave the others uncompiled."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    kernel = flex._load_flex_attention.__wrapped__(True)
    monkeypatch.setattr(flex, "_load_flex_attention", lambda _: kernel)
    torch.manual_seed(0)
    buckets = set()
    with torch.no_grad():
        for queries in range(100, 1300, 60):
            q, k = torch.randn(1, 1, queries, 16), torch.randn(1, 1, queries + 50, 16)
            offset = torch.arange(-50, queries)[None]
            visibility = Visibility(offset, offset + 60, queries, (KeyRange(queries + 50, -50, 1, 60),))
            out, _ = flex.attend(q, k, k, visibility, scale=0.25)
            buckets.add((flex.round_up(queries), flex.round_up(queries + 50)))
    expected, _ = reference.attend(q, k, k, visibility, scale=0.25)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert 8 < counter.frame_count <= len(buckets) < 25
