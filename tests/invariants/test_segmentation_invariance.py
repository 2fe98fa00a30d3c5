"""Invariant 2: neither logits nor state depend on how a stream is split into segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.invariants.strategies import Case, cases, distance, read, segment_bounds
from tests.memory_zoo import CHOOSING, KINDS

EXACT = 1e-10
"""float64: sums in another order, about ten thousand operations deep."""
SINGLE = 1e-4
"""float32, as documented."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_segmentation_equals_one_segment(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    expected, expected_state = read(case)
    logits, state = read(case, data.draw(segment_bounds(case.length)))
    assert (expected - logits).abs().max() < EXACT
    assert distance(expected_state, state) < EXACT


# Discrete choices may differ in float32, so kinds that make them are tested in float64 only.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - CHOOSING))
@given(data=st.data())
def test_any_segmentation_is_close_in_float32(kind: str, data: st.DataObject) -> None:
    double = data.draw(cases(kind))
    case = Case(double.model.float(), double.tokens, double.document_starts, double.description)
    expected, expected_state = read(case)
    logits, state = read(case, data.draw(segment_bounds(case.length)))
    scale = max(1.0, expected.abs().max().item())
    assert (expected - logits).abs().max() / scale < SINGLE
    assert distance(expected_state, state) < SINGLE * 10


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_later_tokens_do_not_affect_earlier_logits(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    index = data.draw(st.integers(0, case.length - 1))
    changed = case.tokens.clone()
    changed[:, index] = (changed[:, index] + 1) % case.model.vocab_size
    before, _ = read(case)
    after, _ = read(Case(case.model, changed, case.document_starts, ""))
    assert torch.equal(before[:, :index], after[:, :index])
    assert not torch.allclose(before[:, index], after[:, index])
