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
    settings = {"dim": 16, "depth": 3, "heads": 2, "memories": [COMPRESSED], **options}
    return MemoryTransformer(32, **settings)  # type: ignore[arg-type]


def test_parameters_are_counted_once() -> None:
    decoder = model(memories=[COMPRESSED, NoMemory, RecurrentMemory])
    counts = cost.count_parameters(decoder)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in decoder.parameters())
    assert counts["embedding"] == 32 * 16
    assert counts["memory"] == 4 * 16 * 16 + 16
    assert "head" not in counts, "it is the embedding"
    assert cost.count_parameters(model(tie_embeddings=False))["head"] == 32 * 16


def test_operations_by_hand() -> None:
    decoder = model(memories=[NoMemory], feed_forward=FeedForward)
    flops = cost.count_flops(decoder, 8)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    assert flops.forward == 2 * matrices + 3 * 4 * 16 * (8 * 9 / 2) / 8
    assert flops.training == 3 * flops.forward
    assert flops.includes_attention
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    assert cost.count_flops(decoder, 8).training == flops.forward


def test_pairs_in_a_window_do_not_depend_on_the_segment() -> None:
    decoder = model(memories=[partial(RecurrentMemory, window=6)], feed_forward=FeedForward)
    matrices = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 32
    for segment in (4, 32):
        # The five positions before the segment are projected to keys and values again.
        again = 3 * 2 * 16 * 16 * 5 / segment
        assert cost.count_flops(decoder, segment).forward == 2 * (matrices + again) + 3 * 4 * 16 * 6


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bptt_segments", [1, 2])
def test_activation_bytes_equal_a_real_pass(bf16: bool, bptt_segments: int) -> None:
    decoder = model()
    weight_storages = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weight_storages:
            saved[storage._cdata] = storage
        return tensor

    tokens, state = torch.zeros(3, 16, dtype=torch.int64), decoder.init_state(3)
    document_starts = torch.zeros(3, 16, dtype=torch.bool)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        for _ in range(bptt_segments):
            state = decoder(tokens, state, document_starts=document_starts, labels=tokens).state
    real = sum(storage.nbytes() for storage in saved.values())
    counted = cost.activation_bytes(decoder, 3, 16, bptt_segments, bf16=bf16)
    # What segments share (the state between them, weights in two bytes) counts in each of them.
    assert counted == real if bptt_segments == 1 else real <= counted < 1.5 * real


def test_replay_and_checkpointing_store_less() -> None:
    decoder = model(depth=6)
    full = cost.activation_bytes(decoder, 2, 32, 4)
    assert cost.activation_bytes(decoder, 2, 32, 4, replay=True) < 0.5 * full
    decoder.activation_checkpointing = True
    assert cost.activation_bytes(decoder, 2, 32, 4) < 0.5 * full


def test_optimizer_bytes_equal_a_real_optimizer() -> None:
    decoder = model()
    num_parameters = sum(parameter.numel() for parameter in decoder.parameters())
    num_tensors = len(list(decoder.parameters()))
    assert cost.optimizer_bytes(decoder, torch.optim.AdamW) == 8 * num_parameters + 4 * num_tensors, (
        "two averages and a counter each"
    )
    assert cost.optimizer_bytes(decoder, partial(torch.optim.SGD, lr=0.1)) == 0


def test_counting_does_not_change_the_model() -> None:
    decoder, rng_state = model(), torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    cost.count_flops(decoder, 8)
    cost.activation_bytes(decoder, 1, 8)
    cost.measure_peak_flops(torch.device("cpu"), torch.float32, 8)
    assert torch.equal(torch.random.get_rng_state(), rng_state), "or a run would draw other numbers"
    assert all(torch.equal(tensor, decoder.state_dict()[name]) for name, tensor in before.items())
    assert not any(part._forward_pre_hooks for part in decoder.modules())
