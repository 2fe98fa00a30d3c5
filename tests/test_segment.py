"""Ticks, positions and ends against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.segment import INFINITE_OFFSET, Segment


@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 10**9), st.integers(0, 2**31), st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_locate(rows: int, length: int, carried: int, seed: int, chance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, length, generator=generator) < chance
    read = carried + torch.arange(rows)
    segment = Segment.from_document_starts(read, length, starts)
    for row in range(rows):
        position, document = int(read[row]), 0
        for tick in range(length):
            if starts[row, tick]:
                position, document = 0, document + 1
            assert int(segment.position[row, tick]) == position
            assert int(segment.document_id[row, tick]) == document
            later = [t for t in range(tick + 1, length) if starts[row, t]]
            assert int(segment.document_end[row, tick]) == (later[0] if later else INFINITE_OFFSET)
            position += 1
        begins = starts[row].nonzero().flatten().tolist()
        assert int(segment.past_document_end[row]) == (begins[0] if begins else INFINITE_OFFSET)
        assert int(segment.next_position[row]) == position


@given(st.integers(1, 3), st.integers(1, 30), st.integers(0, 10**9))
@settings(deadline=None, max_examples=20)
def test_no_starts_are_starts_nowhere(rows: int, length: int, carried: int) -> None:
    read = carried + torch.arange(rows)
    nowhere = Segment.from_document_starts(read, length, torch.zeros(rows, length, dtype=torch.bool))
    none = Segment.from_document_starts(read, length)
    for name in ("position", "document_id", "document_end", "past_length", "past_document_end"):
        assert torch.equal(getattr(none, name), getattr(nowhere, name))


def test_once_makes_once_a_call() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(0)
        return len(made)

    segment, other = (
        Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 3),
        Segment.from_document_starts(torch.zeros(1).long(), 3),
    )
    assert [segment.memo("a", make), segment.memo("a", make), segment.memo("b", make), other.memo("a", make)] == [
        1,
        1,
        2,
        3,
    ]


def test_refuses() -> None:
    carried = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(MemtxError, match="0 tokens"):
        Segment.from_document_starts(carried, 0)
    with pytest.raises(MemtxError, match=r"expected bool \(2, 4\)"):
        Segment.from_document_starts(carried, 4, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(MemtxError, match="expected bool"):
        Segment.from_document_starts(carried, 4, torch.zeros(2, 4))
