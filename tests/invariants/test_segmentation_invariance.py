"""Promise 2: how a stream is cut does not matter, to logits and to the state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.invariants.strategies import Case, cases, cuts, distance, read
from tests.memory_zoo import CHOOSING, KINDS

EXACT = 1e-10
"""float64: sums in another order, some ten thousand operations deep."""
SINGLE = 1e-4
"""float32: the design's promise."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_two_ways_to_cut_agree(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    n = case.tokens.shape[1]
    whole, last = read(case, [0, n])
    parts, end = read(case, data.draw(cuts(n)))
    assert (whole - parts).abs().max() < EXACT
    assert distance(last, end) < EXACT


# Choices are left to float64.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - CHOOSING))
@given(data=st.data())
def test_they_agree_in_float32(kind: str, data: st.DataObject) -> None:
    double = data.draw(cases(kind))
    case = Case(double.model.float(), double.tokens, double.starts, double.described)
    n = case.tokens.shape[1]
    whole, last = read(case, [0, n])
    parts, end = read(case, data.draw(cuts(n)))
    scale = max(1.0, whole.abs().max().item())
    assert (whole - parts).abs().max() / scale < SINGLE
    assert distance(last, end) < SINGLE * 10


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_comes_later_changes_nothing_before(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    n = case.tokens.shape[1]
    at = data.draw(st.integers(0, n - 1))
    changed = case.tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % case.model.vocab_size
    before, _ = read(case, [0, n])
    after, _ = read(Case(case.model, changed, case.starts, ""), [0, n])
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.allclose(before[:, at], after[:, at])
