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
    given = {"dim": 16, "depth": 3, "heads": 2, "memories": [COMPRESSED], **options}
    return MemoryTransformer(32, **given)  # type: ignore[arg-type]


def test_parameters_are_counted_once() -> None:
    made = model(memories=[COMPRESSED, NoMemory, RecurrentMemory])
    parts = cost.count_parameters(made)
    assert sum(parts.values()) == sum(one.numel() for one in made.parameters())
    assert parts["embedding"] == 32 * 16
    assert parts["memory"] == 4 * 16 * 16 + 16
    assert "head" not in parts, "it is the embedding"
    assert cost.count_parameters(model(tie_embeddings=False))["head"] == 32 * 16


def test_operations_by_hand() -> None:
    made = model(memories=[NoMemory], feed_forward=FeedForward)
    found = cost.count_flops(made, 8)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    assert found.forward == 2 * matrices + 3 * 4 * 16 * (8 * 9 / 2) / 8
    assert found.training == 3 * found.forward
    assert found.includes_attention
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    assert cost.count_flops(made, 8).training == found.forward


def test_pairs_in_a_window_do_not_depend_on_the_segment() -> None:
    made = model(memories=[partial(RecurrentMemory, window=6)], feed_forward=FeedForward)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    for segment in (4, 32):
        # The five positions before the segment are projected to keys and values anew.
        again = 3 * 2 * 16 * 16 * 5 / segment
        assert cost.count_flops(made, segment).forward == 2 * (matrices + again) + 3 * 4 * 16 * 6


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("horizon", [1, 2])
def test_activation_bytes_equal_a_real_pass(half: bool, horizon: int) -> None:
    made = model()
    own = {one.untyped_storage()._cdata for one in made.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    tokens, state = torch.zeros(3, 16, dtype=torch.int64), made.init_state(3)
    starts = torch.zeros(3, 16, dtype=torch.bool)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), hooks:
        for _ in range(horizon):
            state = made(tokens, state, document_starts=starts, labels=tokens).state
    real = sum(storage.nbytes() for storage in kept.values())
    counted = cost.activation_bytes(made, 3, 16, horizon, bf16=half)
    # What segments share (the state between them, weights in two bytes) counts in each of them.
    assert counted == real if horizon == 1 else real <= counted < 1.5 * real


def test_replay_and_checkpointing_store_less() -> None:
    made = model(depth=6)
    whole = cost.activation_bytes(made, 2, 32, 4)
    assert cost.activation_bytes(made, 2, 32, 4, replay=True) < 0.5 * whole
    made.activation_checkpointing = True
    assert cost.activation_bytes(made, 2, 32, 4) < 0.5 * whole


def test_optimizer_bytes_equal_a_real_optimizer() -> None:
    made = model()
    number = sum(one.numel() for one in made.parameters())
    tensors = len(list(made.parameters()))
    assert cost.optimizer_bytes(made, torch.optim.AdamW) == 8 * number + 4 * tensors, "two averages and a counter each"
    assert cost.optimizer_bytes(made, partial(torch.optim.SGD, lr=0.1)) == 0


def test_counting_does_not_change_the_model() -> None:
    made, random = model(), torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    cost.count_flops(made, 8)
    cost.activation_bytes(made, 1, 8)
    cost.measure_peak_flops(torch.device("cpu"), torch.float32, 8)
    assert torch.equal(torch.random.get_rng_state(), random), "or a run would draw other numbers"
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in before.items())
    assert not any(part._forward_pre_hooks for part in made.modules())
