"""States between batches: stages apart, snapshots and rollbacks, streams dealt to other processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx import MemoryTransformer, MemtxError, RecurrentMemory
from memtx.errors import CheckpointError
from memtx.memory.associative import AssociativeMemory
from memtx.training.carry import Carry, StateReset, get_carry, reassign_streams, restore_rank_state
from tests.training.small import assert_equal

TOKENS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))


def model(**options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    memories = [[partial(RecurrentMemory, window=4), partial(AssociativeMemory, heads=2)]]
    return MemoryTransformer(11, dim=8, depth=1, heads=2, **({"memories": memories} | options))


def test_stages_are_apart_and_another_batch_size_starts_fresh() -> None:
    carry, decoder = Carry(), model()
    state = decoder(TOKENS, carry.get_state("train", decoder, 3)).state.detach()
    carry.set_state("train", state)
    assert carry.get_state("train", decoder, 3) is state
    assert carry.get_state("val", decoder, 3).equals(decoder.init_state(3))
    assert carry.nbytes("train") == state.nbytes > 0
    assert carry.nbytes("val") == 0
    assert carry.get_state("train", decoder, 2).equals(decoder.init_state(2))
    carry.reset("train")
    carry.reset("test")  # which has none
    assert carry.get_state("train", decoder, 3).equals(decoder.init_state(3))


def test_a_stage_is_restored_tensor_by_tensor() -> None:
    carry, restored, decoder = Carry(), Carry(), model()
    carry.set_state("train", decoder(TOKENS).state.detach())
    tensors = carry.state_dict("train")
    assert_equal(tensors, carry.named_tensors("train"))
    restored.load_state_dict("train", tensors)
    restored.load_state_dict("val", {})
    # A checkpoint before the first batch holds what was restored.
    assert_equal(restored.state_dict("train"), tensors)
    assert restored.state_dict("val") == {}
    assert_equal(restored.get_state("train", decoder, 3).named_tensors(), tensors)
    assert_equal(restored.state_dict("train"), tensors)
    restored.load_state_dict("train", tensors)
    with pytest.raises(CheckpointError, match=r"memory of 3 streams, this run has 2.*data.batch_size=3"):
        restored.get_state("train", decoder, 2)


def test_a_rollback_returns_to_the_snapshot() -> None:
    carry, decoder = Carry(), model()
    first = decoder(TOKENS).state.detach()
    carry.set_state("train", first)
    carry.rollback("train")  # without a snapshot nothing changes
    assert carry.get_state("train", decoder, 3) is first
    for mask in (None, torch.tensor([False, True, False])):
        carry.snapshot("train")
        carry.rollback("train")  # nor before the state was read
        assert carry.get_state("train", decoder, 3).equals(first)
        carry.set_state("train", decoder(TOKENS, first).state.detach())
        # The snapshot is the first state that was read after it.
        carry.get_state("train", decoder, 3)
        carry.rollback("train", mask)
        expected = first if mask is None else first.reset(mask)
        assert carry.get_state("train", decoder, 3).equals(expected)


def test_a_rollback_resets_streams_that_are_not_finite() -> None:
    carry, decoder = Carry(), model()
    state = decoder(TOKENS).state.detach()

    def spoil(leaf: Tensor) -> Tensor:
        leaf = leaf.clone()
        if leaf.is_floating_point() and leaf.dim() == 3:
            leaf[2, -1, -1] = torch.nan
        return leaf

    spoiled = state.map(spoil)
    carry.set_state("train", spoiled)
    carry.snapshot("train")
    carry.get_state("train", decoder, 3)
    carry.rollback("train", torch.tensor([True, False, False]))
    result = carry.get_state("train", decoder, 3)
    fresh = decoder.init_state(1)
    assert result.select([0]).equals(fresh)
    assert result.select([1]).equals(state.select([1]))
    assert result.select([2]).equals(fresh)


def test_a_carry_is_found_on_modules_that_have_one() -> None:
    class Module:
        carry: object = Carry()

    assert get_carry(Module()) is Module.carry
    Module.carry = "none"
    assert get_carry(Module()) is None
    assert get_carry(object()) is None


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 4),
)
def test_streams_keep_their_number_when_they_are_dealt_out_again(
    sizes: list[int], batch_size: int, world_size: int
) -> None:
    """Stream s of all processes continues as stream s, and streams that were not there are zero."""
    numbers = torch.arange(1, sum(sizes) + 1)
    states: list[dict[str, Tensor]] = [
        {"a": part, "b": part[:, None].repeat(1, 2).double()} if len(part) else {} for part in numbers.split(sizes)
    ]
    dealt = [reassign_streams(states, batch_size, rank) for rank in range(world_size)]
    if not sum(sizes):
        assert dealt == [{}] * world_size
        return
    expected = torch.zeros(max(batch_size * world_size, sum(sizes)), dtype=torch.int64)
    expected[: sum(sizes)] = numbers
    expected = expected[: batch_size * world_size]
    assert torch.equal(torch.cat([state["a"] for state in dealt]), expected)
    assert all(len(state["a"]) == batch_size for state in dealt)
    assert torch.equal(torch.cat([state["b"] for state in dealt]), expected[:, None].repeat(1, 2).double())


def test_states_of_different_memories_are_refused() -> None:
    for states in ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], [{"a": torch.tensor(1.0)}]):
        with pytest.raises(CheckpointError, match="have different memories"):
            reassign_streams(states, 2, 0)


def test_a_loader_without_streams_needs_as_many_processes() -> None:
    class Streams:
        batch_size, position = 1, 4

    states = [{"a": torch.tensor([1, 2])}, {"a": torch.tensor([3, 4])}]
    assert restore_rank_state(states, object(), 1, 2) is states[1]
    for rank in range(4):
        assert restore_rank_state(states, Streams(), rank, 4)["a"].tolist() == [rank + 1]
    with pytest.raises(CheckpointError, match=r"from 2 processes, this run has 3.*Resume with 2 processes"):
        restore_rank_state(states, object(), 1, 3)


def test_streams_are_reset_at_their_rate_and_alike_on_all_processes() -> None:
    decoder = model()
    state = decoder(TOKENS[:1].expand(400, -1)).state.detach()
    reset = StateReset(decoder, 0.3)
    in_one_process = reset(state, seed=5)
    is_fresh = in_one_process.position == 0
    # 400 draws at 30%: three standard deviations are 0.069.
    assert float(is_fresh.float().mean()) == pytest.approx(0.3, abs=0.069)
    assert in_one_process.equals(state.reset(is_fresh))
    half = state.select(list(range(200)))
    parts = [reset(half, seed=5, rank=rank, world_size=2).position for rank in range(2)]
    assert torch.equal(torch.cat(parts), in_one_process.position)
    assert not torch.equal(reset(state, seed=6).position, in_one_process.position)
    assert StateReset(decoder, 0.0)(state, seed=5) is state
    assert (StateReset(decoder, 1.0)(state, seed=5).position == 0).all()


def test_models_with_an_unbounded_memory_are_reset_by_default() -> None:
    assert StateReset(model()).prob == 0.05
    assert StateReset(model(memories=[partial(RecurrentMemory, window=4)])).prob == 0
    assert StateReset(model(memories=[partial(RecurrentMemory, window=4)]), 0.2).prob == 0.2
    for prob in (-0.1, 1.1):
        with pytest.raises(MemtxError, match=f"state_reset_prob is {prob}"):
            StateReset(model(), prob)
