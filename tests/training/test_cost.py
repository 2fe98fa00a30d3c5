from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from memtx.layers.feed_forward import FeedForward
from memtx.memory.compressed import CompressedMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training import cost

COMPRESSED = partial(CompressedMemory, window=8, compression_rate=4, num_entries=4)


def model(**options: object) -> MemoryTransformer:
    inputs = {"dim": 16, "depth": 3, "heads": 2, "memories": [COMPRESSED], **options}
    return MemoryTransformer(32, **inputs)  # type: ignore[arg-type]


def test_parameters_are_counted_once() -> None:
    built = model(memories=[COMPRESSED, NoMemory, RecurrentMemory])
    parts = cost.count_parameters(built)
    assert sum(parts.values()) == sum(item.numel() for item in built.parameters())
    assert parts["embedding"] == 32 * 16
    assert parts["memory"] == 4 * 16 * 16 + 16
    assert "head" not in parts, "it is the embedding"
    assert cost.count_parameters(model(tie_embeddings=False))["head"] == 32 * 16


def test_operations_by_hand() -> None:
    built = model(memories=[NoMemory], feed_forward=FeedForward)
    result = cost.count_flops(built, 8)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    assert result.forward == 2 * matrices + 3 * 4 * 16 * (8 * 9 / 2) / 8
    assert result.training == 3 * result.forward
    assert result.includes_attention
    for parameter in built.parameters():
        parameter.requires_grad_(False)
    assert cost.count_flops(built, 8).training == result.forward


def test_pairs_in_a_window_do_not_depend_on_the_segment() -> None:
    built = model(memories=[partial(RecurrentMemory, window=6)], feed_forward=FeedForward)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    for segment in (4, 32):
        # The five positions before the segment are projected to keys and values again.
        again = 3 * 2 * 16 * 16 * 5 / segment
        assert cost.count_flops(built, segment).forward == 2 * (matrices + again) + 3 * 4 * 16 * 6


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bptt_segments", [1, 2])
def test_activation_bytes_equal_a_real_pass(half: bool, bptt_segments: int) -> None:
    built = model()
    trained_module = {item.untyped_storage()._cdata for item in built.parameters()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in trained_module:
            saved[storage._cdata] = storage
        return tensor

    tokens, state = torch.zeros(3, 16, dtype=torch.int64), built.init_state(3)
    document_starts = torch.zeros(3, 16, dtype=torch.bool)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), hooks:
        for _ in range(bptt_segments):
            state = built(tokens, state, document_starts=document_starts, labels=tokens).state
    real = sum(storage.nbytes() for storage in saved.values())
    counted = cost.activation_bytes(built, 3, 16, bptt_segments, bf16=half)
    # What segments share (the state between them, weights in two bytes) counts in each of them.
    assert counted == real if bptt_segments == 1 else real <= counted < 1.5 * real


def test_replay_and_checkpointing_store_less() -> None:
    built = model(depth=6)
    full = cost.activation_bytes(built, 2, 32, 4)
    assert cost.activation_bytes(built, 2, 32, 4, replay=True) < 0.5 * full
    built.activation_checkpointing = True
    assert cost.activation_bytes(built, 2, 32, 4) < 0.5 * full


def test_optimizer_bytes_equal_a_real_optimizer() -> None:
    built = model()
    number = sum(item.numel() for item in built.parameters())
    tensors = len(list(built.parameters()))
    assert cost.optimizer_bytes(built, torch.optim.AdamW) == 8 * number + 4 * tensors, "two averages and a counter each"
    assert cost.optimizer_bytes(built, partial(torch.optim.SGD, lr=0.1)) == 0


def test_counting_does_not_change_the_model() -> None:
    built, random = model(), torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    cost.count_flops(built, 8)
    cost.activation_bytes(built, 1, 8)
    cost.measure_peak_flops(torch.device("cpu"), torch.float32, 8)
    assert torch.equal(torch.random.get_rng_state(), random), "or a run would draw other numbers"
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in before.items())
    assert not any(part._forward_pre_hooks for part in built.modules())
