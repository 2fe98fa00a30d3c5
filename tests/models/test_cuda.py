"""The whole model on a GPU: equal to the CPU, and CUDA graphs equal eager steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from memtx import CompressedMemory, MemoryTransformer
from memtx.inference.decoder import Decoder

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def create_model(device: str) -> MemoryTransformer:
    torch.manual_seed(0)
    memory = partial(CompressedMemory, window=40, compression_rate=4, num_entries=8)
    return MemoryTransformer(50, dim=128, depth=2, heads=2, memories=[memory]).to(device)


def test_two_segments_and_gradients_match_cpu() -> None:
    tokens = torch.randint(0, 50, (3, 101), generator=torch.Generator().manual_seed(1))
    losses, grads = [], []
    for device in ("cpu", "cuda"):
        model, inputs = create_model(device), tokens.to(device)
        state = model(inputs[:, :50]).state
        loss = model(inputs[:, 50:-1], state, document_starts=inputs[:, 50:-1] == 3, labels=inputs[:, 51:]).loss
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        grads.append([weight.grad.cpu() for weight in model.parameters() if weight.grad is not None])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # float32, sums in another order
    for cpu_grad, cuda_grad in zip(*grads, strict=True):
        # float32 through two layers; tensor cores may round products to TF32's 11 bits.
        torch.testing.assert_close(cpu_grad, cuda_grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_replayed_steps_equal_eager_ones(mode: str) -> None:
    model = create_model("cuda")
    tokens = torch.randint(0, 50, (60, 3), device="cuda")
    state = model(tokens[:30].T).state
    plain = Decoder(model, state, use_cuda_graph=False)
    fast = Decoder(model, state, use_cuda_graph=mode == "graph", torch_compile=mode == "compiled")
    for token in tokens[30:]:
        # float32: a compiled step may fuse sums, and thirty steps lie between.
        torch.testing.assert_close(fast.step(token), plain.step(token), rtol=1e-3, atol=1e-4)
    assert fast.state.equals(plain.state, atol=1e-4)  # float32, thirty steps


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_replayed_steps_equal_eager_ones_while_streams_change(mode: str) -> None:
    model = create_model("cuda")
    tokens = torch.randint(0, 50, (60, 5), device="cuda")
    state = model(tokens[:30].T).state
    plain = Decoder(model, state.select([0]), use_cuda_graph=False)
    fast = Decoder(model, state.select([0]), use_cuda_graph=mode == "graph", torch_compile=mode == "compiled")
    for index, token in enumerate(tokens[30:]):
        for decoder in (plain, fast):
            if index in (3, 7, 8, 20):
                decoder.append(state.select([index % 5]))
            if index == 12:
                decoder.select([0, 3, 2])
        token = token[: plain.batch_size]
        # float32: a compiled step may fuse sums, and thirty steps lie between.
        torch.testing.assert_close(fast.step(token), plain.step(token), rtol=1e-3, atol=1e-4)
    assert fast.state.equals(plain.state, atol=1e-4)  # float32, thirty steps
