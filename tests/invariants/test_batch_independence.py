"""Promise 3: rows are independent, a reset row is a fresh one, and packed documents are read as if alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx import MemoryTransformer
from memtx.errors import MemtxError
from memtx.state import MemoryState
from tests.invariants.strategies import Case, cases, cuts, distance, read
from tests.memory_zoo import KINDS

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


PADDED = ["recurrent", "compressed-convolution", "compressed-most_used"]


@pytest.mark.parametrize("kind", PADDED)
@given(data=st.data())
def test_rows_of_different_lengths_are_what_each_is_alone(kind: str, data: st.DataObject) -> None:
    """What is put behind a row's tokens, a document's beginning included, changes neither them nor the state."""
    case = data.draw(cases(kind, rows=3))
    n = case.tokens.shape[1]
    _, before = read(case, [0, n])
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3)))
    out = case.model(case.tokens, before, document_starts=case.starts, valid_length=lengths)
    for row, length in enumerate(lengths.tolist()):
        state = before.select([row])
        if length:
            own = Case(case.model, case.tokens[row : row + 1, :length], case.starts[row : row + 1, :length], "")
            logits, state = read(own, [0, length], state)
            assert (out.logits[row, :length] - logits[0]).abs().max() < EXACT
        assert distance(out.state.select([row]), state) < EXACT


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("recurrent", "compressed"))])
def test_other_kinds_refuse_rows_of_different_lengths(kind: str) -> None:
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[KINDS[kind](4, 2, 2)]).eval()
    with pytest.raises(MemtxError, match="valid_length was given to memories that read all tokens"):
        model(torch.zeros(2, 3, dtype=torch.int64), valid_length=torch.tensor([3, 1]))


def test_lengths_are_checked() -> None:
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[KINDS["recurrent"](4, 2, 2)]).eval()
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(MemtxError, match=r"valid_length is torch.int64 \(3,\), expected int64 \(2,\)"):
        model(tokens, valid_length=torch.tensor([3, 1, 1]))
    with pytest.raises(MemtxError, match=r"valid_length is \[3, 4\]"):
        model(tokens, valid_length=torch.tensor([3, 4]))
    with pytest.raises(MemtxError, match="valid_length was given in training"):
        model.train()(tokens, valid_length=torch.tensor([3, 1]))
