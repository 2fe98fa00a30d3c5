"""Invariant 3: streams in a batch are independent, reset streams are fresh, and packed documents are separate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx import MemoryTransformer
from memtx.errors import MemtxError
from memtx.state import MemoryState
from tests.invariants.strategies import cases, distance, read, segment_bounds
from tests.memory_zoo import KINDS

EXACT = 1e-10
"""float64: batched products may sum in another order than single ones."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_batched_streams_equal_separate_ones(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, batch_size=3))
    bounds = data.draw(segment_bounds(case.length))
    logits, state = read(case, bounds)
    for index in range(3):
        expected, expected_state = read(case.slice(index), bounds)
        assert (logits[index : index + 1] - expected).abs().max() < EXACT
        assert distance(state.select([index]), expected_state) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_packed_documents_equal_separate_ones(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    length = case.length
    logits, state = read(case, data.draw(segment_bounds(length)))
    for index in range(case.tokens.shape[0]):
        bounds = [0, *[start for start in range(1, length) if case.document_starts[index, start]], length]
        for start, stop in itertools.pairwise(bounds):
            document = replace(case.slice(index, start, stop), document_starts=torch.zeros(1, stop - start).bool())
            expected, expected_state = read(document)
            assert (logits[index : index + 1, start:stop] - expected).abs().max() < EXACT
        assert distance(state.select([index]), expected_state) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_reset_streams_are_fresh_and_the_others_stay(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, batch_size=3))
    _, state = read(case)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    reset = state.reset(mask)
    for index in range(3):
        expected = case.model.init_state(1) if mask[index] else state.select([index])
        assert distance(reset.select([index]), expected) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_joined_streams_continue_as_separate_ones(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, batch_size=2))
    streams = [case.slice(index) for index in (0, 1)]
    states = [read(stream, data.draw(segment_bounds(case.length)))[1] for stream in streams]
    # The second stream has read twice as much.
    states[1] = read(streams[1], state=states[1])[1]
    logits, _ = read(case, state=MemoryState.concat(states))
    for index, (stream, state) in enumerate(zip(streams, states, strict=True)):
        assert (logits[index : index + 1] - read(stream, state=state)[0]).abs().max() < EXACT


PADDED_KINDS = [
    "recurrent",
    "recurrent-expire-span",
    "compressed-convolution",
    "compressed-most_used",
    "gated-delta-net",
    "copy",
]


@pytest.mark.parametrize("kind", PADDED_KINDS)
@given(data=st.data())
def test_padded_streams_equal_separate_ones(kind: str, data: st.DataObject) -> None:
    """Padding, even with document starts, changes neither the outputs before it nor the state."""
    case = data.draw(cases(kind, batch_size=3))
    length = case.length
    _, past = read(case)
    valid_length = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=3, max_size=3)))
    out = case.model(case.tokens, past, document_starts=case.document_starts, valid_length=valid_length)
    for index, stop in enumerate(valid_length.tolist()):
        state = past.select([index])
        if stop:
            logits, state = read(case.slice(index, 0, stop), state=state)
            assert (out.logits[index, :stop] - logits[0]).abs().max() < EXACT
        assert distance(out.state.select([index]), state) < EXACT


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not kind.startswith(("recurrent", "compressed", "gated-delta", "copy"))]
)
def test_kinds_without_padding_support_reject_it(kind: str) -> None:
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[KINDS[kind](4, 2, 2)]).eval()
    with pytest.raises(MemtxError, match="valid_length was given to memories that do not support padding"):
        model(torch.zeros(2, 3, dtype=torch.int64), valid_length=torch.tensor([3, 1]))


def test_bad_valid_length_raises() -> None:
    model = MemoryTransformer(11, dim=8, depth=1, heads=2, memories=[KINDS["recurrent"](4, 2, 2)]).eval()
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(MemtxError, match=r"valid_length is torch.int64 \(3,\), expected int64 \(2,\)"):
        model(tokens, valid_length=torch.tensor([3, 1, 1]))
    with pytest.raises(MemtxError, match=r"valid_length is \[3, 4\]"):
        model(tokens, valid_length=torch.tensor([3, 4]))
    with pytest.raises(MemtxError, match="valid_length was given in training"):
        model.train()(tokens, valid_length=torch.tensor([3, 1]))
