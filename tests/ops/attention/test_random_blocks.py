"""Big Bird's random blocks: which may be drawn, that a seed fixes them, and that nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.ops.attention.random_blocks import sample_random_blocks


@given(
    size=st.integers(1, 70),
    count=st.integers(0, 4),
    more=st.integers(1, 9),
    heads=st.integers(1, 3),
    seed=st.integers(0, 50),
)
def test_blocks_are_distinct_and_not_seen_otherwise(size: int, count: int, more: int, heads: int, seed: int) -> None:
    blocks = 5 + 2 * count + more
    if blocks * size in (1024, 3072, 4096):
        return
    table = sample_random_blocks(blocks * size, size, count, heads, max_length=4096, seed=seed)
    assert table.shape == (heads, blocks - 2, count)
    assert table.dtype == torch.int64
    for own in table:
        for block, drawn in enumerate(own.tolist(), start=1):
            assert len(set(drawn)) == count
            assert not set(drawn) & {0, block - 1, block, block + 1, blocks - 1}
            assert all(0 < each < 2 * count + 5 for each in drawn)


@pytest.mark.parametrize("length", [1024, 3072, 4096])
def test_the_articles_own_lengths(length: int) -> None:
    table = sample_random_blocks(length, 64, 3, 2, max_length=4096, seed=1)
    assert table.shape == (2, length // 64 - 2, 3)
    for own in table[:, : 64 - 4]:
        for block, drawn in enumerate(own.tolist(), start=1):
            assert len(set(drawn)) == 3
            assert all(0 < each < 16 for each in drawn)  # within 1024 tokens from the beginning
            assert block > 60 or not set(drawn) & {block - 1, block, block + 1}


def test_a_seed_fixes_them_and_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    one, other = (sample_random_blocks(100, 4, 2, 3, max_length=200, seed=seed) for seed in (0, 1))
    assert torch.equal(one, sample_random_blocks(100, 4, 2, 3, max_length=200, seed=0))
    assert not torch.equal(one, other)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    # Checkpoints depend on these very numbers.
    assert one[0, :3].tolist() == EXPECTED


EXPECTED = [[4, 6], [6, 7], [1, 5]]


def test_too_few_to_choose_from_is_named() -> None:
    with pytest.raises(MemtxError, match="are to be drawn"):
        sample_random_blocks(1024, 128, 6, 1, max_length=1024, seed=0)
