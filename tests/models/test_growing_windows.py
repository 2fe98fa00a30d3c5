"""Windows by depth, memories in chosen layers, and the list that the config stores."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx import (
    AssociativeMemory,
    CompressedMemory,
    GrowingWindows,
    MemoryTransformer,
    MemtxError,
    RecurrentMemory,
    class_config,
)
from memtx.memory.retrieval import RetrievalMemory


def build(depth: int, **options: Any) -> MemoryTransformer:
    return MemoryTransformer(30, dim=8, depth=depth, heads=2, memories=GrowingWindows(**options))


def layers(model: MemoryTransformer) -> list[list[str]]:
    """Return the kinds of each layer's memories with their windows."""
    return [
        [f"{type(memory).__name__} {getattr(memory, 'window', '')}".strip() for memory in block.attention.memories]
        for block in model._layers()
    ]


def test_windows_double_up_to_the_last() -> None:
    assert layers(build(3, window=64)) == [["RecurrentMemory 16"], ["RecurrentMemory 32"], ["RecurrentMemory 64"]]
    windows = [memory[0].split()[1] for memory in layers(build(5, window=48, min_window=10))]
    assert windows == ["10", "10", "12", "24", "48"]


def test_memories_stand_in_the_chosen_layers() -> None:
    compressed = partial(CompressedMemory, num_entries=3)
    assert layers(build(3, window=64, memories=[compressed]))[1:] == [["RecurrentMemory 32"], ["CompressedMemory 64"]]
    every = build(4, window=64, memories=[partial(AssociativeMemory, heads=2)], every_n_layers=2)
    assert [len(memories) for memories in layers(every)] == [1, 2, 1, 2]
    both = build(3, window=64, memories=[partial(RetrievalMemory, capacity=9, heads=2), CompressedMemory], layers=[1])
    assert layers(both)[1] == ["CompressedMemory 32", "RetrievalMemory"]
    assert both._layers()[1].attention.memories[1].exclude_recent == 32
    far = build(2, window=32, memories=[partial(RecurrentMemory, window=100, near_window=1, entry_bias=-3.0)])
    memory = far._layers()[1].attention.memory
    assert (memory.window, memory.near_window) == (100, 32)


def test_a_factory_from_a_config_is_as_good() -> None:
    config = {"class_path": "memtx.models.growing_windows.GrowingWindows", "init_args": {"window": 64}}
    model = MemoryTransformer(30, dim=8, depth=3, heads=2, memories=class_config.from_config(config))
    assert layers(model) == layers(build(3, window=64))


def test_the_config_stores_the_list(tmp_path: Path) -> None:
    model = build(3, window=64, memories=[partial(CompressedMemory, num_entries=3)]).eval()
    memories = json.loads(json.dumps(model.config))["init_args"]["memories"]
    assert [stack[0]["init_args"]["window"] for stack in memories] == [16, 32, 64]
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(30, (1, 20))
    assert torch.equal(MemoryTransformer.from_pretrained(str(tmp_path / "model"))(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("options", [{"window": 8}, {"window": 0}, {"layers": [3]}, {"every_n_layers": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MemtxError, match=r"window|layers"):
        build(3, **options)
