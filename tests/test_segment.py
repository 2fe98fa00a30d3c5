"""Offsets, positions and document ends, compared with a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.segment import INFINITE_OFFSET, Segment


@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 10**9), st.integers(0, 2**31), st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_positions_and_document_ends_match_a_loop(
    batch_size: int, length: int, past_tokens: int, seed: int, start_prob: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    document_starts = torch.rand(batch_size, length, generator=generator) < start_prob
    past_length = past_tokens + torch.arange(batch_size)
    segment = Segment.from_document_starts(past_length, length, document_starts)
    for index in range(batch_size):
        position, document_id = int(past_length[index]), 0
        for offset in range(length):
            if document_starts[index, offset]:
                position, document_id = 0, document_id + 1
            assert int(segment.position[index, offset]) == position
            assert int(segment.document_id[index, offset]) == document_id
            later_starts = [later for later in range(offset + 1, length) if document_starts[index, later]]
            expected_end = later_starts[0] if later_starts else INFINITE_OFFSET
            assert int(segment.document_end[index, offset]) == expected_end
            position += 1
        offsets = document_starts[index].nonzero().flatten().tolist()
        assert int(segment.past_document_end[index]) == (offsets[0] if offsets else INFINITE_OFFSET)
        assert int(segment.next_position[index]) == position


@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_no_document_starts_equal_starts_that_are_all_false(batch_size: int, length: int, past_tokens: int) -> None:
    past_length = past_tokens + torch.arange(batch_size)
    all_false = Segment.from_document_starts(past_length, length, torch.zeros(batch_size, length, dtype=torch.bool))
    none = Segment.from_document_starts(past_length, length)
    for name in ("position", "document_id", "document_end", "past_length", "past_document_end"):
        assert torch.equal(getattr(none, name), getattr(all_false, name))


def test_memo_computes_once_per_key_and_segment() -> None:
    calls: list[int] = []

    def count_calls() -> int:
        calls.append(0)
        return len(calls)

    segment, other = (Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 3) for _ in range(2))
    assert [segment.memo("a", count_calls), segment.memo("a", count_calls)] == [1, 1]
    assert [segment.memo("b", count_calls), other.memo("a", count_calls)] == [2, 3]


def test_bad_arguments_raise() -> None:
    past_length = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(MemtxError, match="has 0 tokens"):
        Segment.from_document_starts(past_length, 0)
    with pytest.raises(MemtxError, match=r"expected bool \(2, 4\)"):
        Segment.from_document_starts(past_length, 4, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(MemtxError, match="expected bool"):
        Segment.from_document_starts(past_length, 4, torch.zeros(2, 4))
