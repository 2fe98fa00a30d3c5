"""Layers with several memories: state, saving, configuration and errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import memtx
from memtx import CompressedMemory, MemoryTransformer, MemtxError, NoMemory, RecurrentMemory
from memtx.state import MemoryState
from tests.memory_zoo import KINDS, Stack
from tests.third_party_memory import RunningMean

WINDOW = partial(RecurrentMemory, window=5)
STACK = [WINDOW, RunningMean, partial(RunningMean, gain=0.5)]
TOKENS = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(1))


def small(*memories: Any, depth: int = 2) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(11, dim=8, depth=depth, heads=2, memories=memories).eval()


@pytest.mark.parametrize("memories", [(STACK,), (STACK, NoMemory), (WINDOW, [NoMemory, RunningMean])])
def test_save_and_load_round_trip(memories: Any, tmp_path: Path) -> None:
    model = small(*memories)
    model.save_pretrained(tmp_path / "model")
    loaded = memtx.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, MemoryTransformer)
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint
    state = model(TOKENS).state
    state.save(tmp_path / "state", model.fingerprint)
    again = MemoryState.load(tmp_path / "state", like=loaded.init_state(1), fingerprint=loaded.fingerprint)
    assert again.equals(state)
    assert torch.equal(loaded(TOKENS, again).logits, model(TOKENS, state).logits)


def test_every_memory_of_a_stack_has_a_state_and_weights_of_its_own() -> None:
    model = small(STACK, NoMemory)
    names = set(model(TOKENS).state.named_tensors())
    assert names == {"position", "layers[0][0].hidden", "layers[0][1].total", "layers[0][2].total"}
    first, second = (block.attention.memories for block in model.blocks)
    assert [type(memory) for memory in first] == [RecurrentMemory, RunningMean, RunningMean]
    assert [type(memory) for memory in second] == [NoMemory]
    assert first[1].map.weight is not first[2].map.weight


def test_single_memory_layer_is_unchanged() -> None:
    """Names of weights and states and the config equal those of files written without stacks."""
    model = small(partial(CompressedMemory, window=4, compression_rate=2, num_entries=3), depth=1)
    assert not any("extra_memories" in name for name in model.state_dict())
    assert "blocks.0.attention.memory.compression.proj.weight" in model.state_dict()
    assert set(model.init_state(1).named_tensors()) == {"position", "layers[0][0].hidden", "layers[0][0].bank"}
    assert model.config["init_args"]["memories"] == [
        {
            "class_path": "memtx.memory.compressed.CompressedMemory",
            "init_args": {"window": 4, "compression_rate": 2, "num_entries": 3},
        }
    ]


@pytest.mark.parametrize("kind", ["associative-gated", "associative-infini", "slots", "retrieval", "sinks"])
def test_a_stack_is_compiled_as_one_graph(kind: str) -> None:
    """Except with memory tokens, whose chunk ends depend on the streams' positions."""
    torch._dynamo.reset()
    stack: Stack = KINDS[kind](6, 3, 4)
    model = small(stack)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        plain, actual = model(TOKENS), compiled(TOKENS, model.init_state(2))
    # float32: compiled code may change the memory layout, so products sum in another order.
    torch.testing.assert_close(actual.logits, plain.logits, atol=1e-5, rtol=1e-4)
    assert actual.state.equals(plain.state, 1e-5)


def test_extra_memory_reaches_past_window_unless_gate_is_zero() -> None:
    other = TOKENS.clone()
    other[:, 0] = (other[:, 0] + 1) % 11
    near, far = small([WINDOW, RunningMean], depth=1), small([WINDOW, partial(RunningMean, gain=0.0)], depth=1)
    assert not torch.equal(near(TOKENS).logits[:, -1], near(other).logits[:, -1])
    assert torch.equal(far(TOKENS).logits[:, -1], far(other).logits[:, -1])


@pytest.mark.parametrize(
    ("memories", "message"),
    [
        (([RunningMean, WINDOW],), "RunningMean is the first memory"),
        ((RunningMean,), "RunningMean is the first memory"),
        (([WINDOW, NoMemory],), "NoMemory follows another memory"),
        (([],), "list of memories is empty"),
        ((STACK, STACK, STACK), "3 memories for 2 layers"),
    ],
)
def test_invalid_stacks_are_refused(memories: Any, message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        small(*memories)
