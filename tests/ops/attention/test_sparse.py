"""Random blocks of Big Bird: allowed blocks, reproducibility by seed, and no effect on the global generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.ops.attention.sparse import sample_random_blocks


@given(
    block_size=st.integers(1, 70),
    num_random_blocks=st.integers(0, 4),
    extra_blocks=st.integers(1, 9),
    heads=st.integers(1, 3),
    seed=st.integers(0, 50),
)
def test_random_blocks_are_distinct_and_not_visible_already(
    block_size: int, num_random_blocks: int, extra_blocks: int, heads: int, seed: int
) -> None:
    num_blocks = 5 + 2 * num_random_blocks + extra_blocks
    length = num_blocks * block_size
    if length in (1024, 3072, 4096):
        return
    table = sample_random_blocks(length, block_size, num_random_blocks, heads, max_length=4096, seed=seed)
    assert table.shape == (heads, num_blocks - 2, num_random_blocks)
    assert table.dtype == torch.int64
    for head_table in table:
        for block, sample in enumerate(head_table.tolist(), start=1):
            assert len(set(sample)) == num_random_blocks
            assert not set(sample) & {0, block - 1, block, block + 1, num_blocks - 1}
            assert all(0 < index < 2 * num_random_blocks + 5 for index in sample)


@pytest.mark.parametrize("length", [1024, 3072, 4096])
def test_lengths_of_the_paper_use_their_own_rule(length: int) -> None:
    table = sample_random_blocks(length, 64, 3, 2, max_length=4096, seed=1)
    assert table.shape == (2, length // 64 - 2, 3)
    for head_table in table[:, : 64 - 4]:
        for block, sample in enumerate(head_table.tolist(), start=1):
            assert len(set(sample)) == 3
            assert all(0 < index < 16 for index in sample)  # within 1024 tokens from the start
            assert block > 60 or not set(sample) & {block - 1, block, block + 1}


def test_seed_determines_the_blocks_without_the_global_generator() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first, second = (sample_random_blocks(100, 4, 2, 3, max_length=200, seed=seed) for seed in (0, 1))
    assert torch.equal(first, sample_random_blocks(100, 4, 2, 3, max_length=200, seed=0))
    assert not torch.equal(first, second)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    # Checkpoints depend on these exact numbers.
    assert first[0, :3].tolist() == [[4, 6], [6, 7], [1, 5]]


def test_too_few_candidates_raise() -> None:
    with pytest.raises(MemtxError, match=r"has \d+ candidates for 6 random blocks"):
        sample_random_blocks(1024, 128, 6, 1, max_length=1024, seed=0)
