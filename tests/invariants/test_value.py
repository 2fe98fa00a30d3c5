"""Promise 1: the state is a value; one model serves many streams, and no stream leaves a trace on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from memtx.state import MemoryState
from tests.invariants.strategies import cases, cuts, distance, read
from tests.memory_zoo import KINDS


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_reading_changes_neither_the_model_nor_the_state_it_was_given(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    weights = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in case.model.named_modules()}
    _, state = read(case, [0, case.tokens.shape[1]])
    before = state.map(torch.clone)
    first, one = read(case, [0, case.tokens.shape[1]], state)
    second, other = read(case, [0, case.tokens.shape[1]], state)
    assert torch.equal(first, second)
    assert distance(one, other) == 0.0
    assert distance(state, before) == 0.0
    assert all(torch.equal(weights[name], tensor) for name, tensor in case.model.state_dict().items())
    assert attributes == {name: sorted(module.__dict__) for name, module in case.model.named_modules()}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_state_saved_and_loaded_goes_on_as_before(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = data.draw(cases(kind))
    _, state = read(case, data.draw(cuts(case.tokens.shape[1])))
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    state.save(path, case.model.fingerprint)
    loaded = MemoryState.load(path, like=case.model.init_state(1), fingerprint=case.model.fingerprint)
    assert distance(loaded, state) == 0.0
    whole = [0, case.tokens.shape[1]]
    assert torch.equal(read(case, whole, loaded)[0], read(case, whole, state)[0])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_leaf_has_the_row_first_and_a_fresh_state_is_zeros(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, rows=3))
    fresh = case.model.init_state(3)
    _, state = read(case, [0, case.tokens.shape[1]])
    for leaf, later in zip(pytree.tree_leaves(fresh), pytree.tree_leaves(state), strict=True):
        assert leaf.shape[0] == 3
        assert leaf.shape == later.shape
        assert leaf.dtype == later.dtype
        assert not leaf.any()
