"""Promise 3: rows are independent, a reset row is a fresh one, and packed documents are read as if alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.state import MemoryState
from tests.kinds import KINDS
from tests.promises.drawn import Case, cases, cuts, distance, read

EXACT = 1e-10
"""float64: batched products may sum in another order than single ones."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_row_gives_what_it_gives_alone(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, rows=3))
    borders = data.draw(cuts(case.tokens.shape[1]))
    logits, state = read(case, borders)
    for row in range(3):
        one = Case(case.model, case.tokens[row : row + 1], case.starts[row : row + 1], "")
        own, end = read(one, borders)
        assert (logits[row : row + 1] - own).abs().max() < EXACT
        assert distance(state.select([row]), end) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_packed_documents_are_read_as_if_alone(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    n = case.tokens.shape[1]
    logits, state = read(case, data.draw(cuts(n)))
    for row in range(case.tokens.shape[0]):
        begins = [0, *[at for at in range(1, n) if case.starts[row, at]], n]
        for low, high in itertools.pairwise(begins):
            alone = Case(case.model, case.tokens[row : row + 1, low:high], torch.zeros(1, high - low).bool(), "")
            own, end = read(alone, [0, high - low])
            assert (logits[row : row + 1, low:high] - own).abs().max() < EXACT
        assert distance(state.select([row]), end) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_reset_row_is_a_fresh_one_and_the_others_stay(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, rows=3))
    _, state = read(case, [0, case.tokens.shape[1]])
    marked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    reset = state.reset(marked)
    for row in range(3):
        expected = case.model.init_state(1) if marked[row] else state.select([row])
        assert distance(reset.select([row]), expected) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_rows_joined_from_several_streams_go_on_as_each_alone(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, rows=2))
    n = case.tokens.shape[1]
    streams = [Case(case.model, case.tokens[row : row + 1], case.starts[row : row + 1], "") for row in (0, 1)]
    states = [read(one, data.draw(cuts(n)))[1] for one in streams]
    # One stream is further on than the other.
    states[1] = read(streams[1], [0, n], states[1])[1]
    joined, _ = read(case, [0, n], MemoryState.concat(states))
    for row, (one, state) in enumerate(zip(streams, states, strict=True)):
        assert (joined[row : row + 1] - read(one, [0, n], state)[0]).abs().max() < EXACT
