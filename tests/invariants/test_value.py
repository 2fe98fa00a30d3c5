"""Invariant 1: the state is a value; a model serves many streams and stores none of their data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from memtx.state import MemoryState
from tests.invariants.strategies import cases, distance, read, segment_bounds
from tests.memory_zoo import KINDS


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_reading_changes_neither_model_nor_state(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    weights = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    attributes = {name: sorted(module.__dict__) for name, module in case.model.named_modules()}
    _, state = read(case)
    before = state.map(torch.clone)
    first_logits, first_state = read(case, state=state)
    second_logits, second_state = read(case, state=state)
    assert torch.equal(first_logits, second_logits)
    assert distance(first_state, second_state) == 0.0
    assert distance(state, before) == 0.0
    assert all(torch.equal(weights[name], tensor) for name, tensor in case.model.state_dict().items())
    assert attributes == {name: sorted(module.__dict__) for name, module in case.model.named_modules()}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_loaded_state_continues_as_the_saved_one(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = data.draw(cases(kind))
    _, state = read(case, data.draw(segment_bounds(case.length)))
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    state.save(path, case.model.fingerprint)
    loaded = MemoryState.load(path, like=case.model.init_state(1), fingerprint=case.model.fingerprint)
    assert distance(loaded, state) == 0.0
    assert torch.equal(read(case, state=loaded)[0], read(case, state=state)[0])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_leaves_have_the_batch_first_and_a_fresh_state_is_zero(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind, batch_size=3))
    fresh = case.model.init_state(3)
    _, state = read(case)
    for leaf, later in zip(pytree.tree_leaves(fresh), pytree.tree_leaves(state), strict=True):
        assert leaf.shape[0] == 3
        assert leaf.shape == later.shape
        assert leaf.dtype == later.dtype
        assert not leaf.any()
