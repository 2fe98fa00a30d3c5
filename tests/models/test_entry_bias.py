"""A log-weight of entries beyond the exact window, in every backend and precision, and what it begins as."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from memtx import Alibi, CompressedMemory, MemoryTransformer, MemtxError, RecurrentMemory, Rotary, TopKMemory
from memtx.inference.decoder import Decoder
from memtx.memory.ernie_doc import ErnieDocMemory
from memtx.models.sources import hide_sources
from memtx.ops.cpu import attention

MEMORIES: dict[str, Any] = {
    "bank": partial(CompressedMemory, window=7, compression_rate=3, num_entries=6, entry_bias=-1.0),
    "top-k": partial(TopKMemory, window=7, compression_rate=3, num_entries=6, entry_bias=-1.0),
    "cache": partial(RecurrentMemory, window=19, near_window=6, entry_bias=-1.0),
}


def build(memory: Any, **options: Any) -> MemoryTransformer:
    torch.manual_seed(0)
    settings = {"dim": 32, "depth": 2, "heads": 2, "memories": [memory]} | options
    model = MemoryTransformer(30, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for block in model.blocks:
            block.attention.entry_bias.normal_()  # type: ignore[union-attr, operator]
    return model


def biases(model: MemoryTransformer) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("entry_bias")]


@pytest.mark.parametrize("positions", [Rotary, Alibi])
@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("backend", ["banded", "cpp", "flex"])
def test_backends_equal_the_reference(backend: Any, kind: str, positions: Any) -> None:
    if backend == "cpp" and not attention.is_available():
        pytest.skip("there is no C++ compiler")
    exact = build(MEMORIES[kind], positions=positions, attention_backend="reference").double()
    model = build(MEMORIES[kind], positions=positions, attention_backend=backend)
    tokens, state = torch.randint(30, (2, 70)), exact(torch.randint(30, (2, 25))).state.detach()
    expected = exact(tokens[:, :-1], state, labels=tokens[:, 1:])
    state = state.to(dtype=torch.float32)
    with torch.no_grad():
        nll = model(tokens[:, :-1], state, labels=tokens[:, 1:]).nll
    assert (nll - expected.nll).abs().max() < 1e-4  # float32, two layers
    if backend != "flex":  # which has no gradient on the CPU
        model(tokens[:, :-1], state, labels=tokens[:, 1:]).loss.backward()  # type: ignore[union-attr, no-untyped-call]
        expected.loss.backward()
        for bias, reference in zip(biases(model), biases(exact), strict=True):
            assert bias.grad is not None
            assert (bias.grad - reference.grad).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MEMORIES)
def test_decoding_keeps_the_bias(kind: str, dtype: torch.dtype) -> None:
    model = build(MEMORIES[kind])
    tokens = torch.randint(30, (2, 60))
    expected = model(tokens).logits
    decoder = Decoder(model.to(dtype), model.init_state(2))
    logits = torch.stack([decoder.step(token) for token in tokens.T], dim=1)
    with torch.no_grad(), hide_sources(model, ["cache" if kind == "cache" else "bank"]):
        effect = (model(tokens).logits - expected).abs().max()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05  # float32 over 60 tokens; 8 bits of bfloat16
    assert (logits - expected).abs().max() < tolerance < effect


def test_a_closed_bias_is_as_good_as_the_window_alone() -> None:
    model = build(partial(CompressedMemory, window=7, compression_rate=3, num_entries=6, entry_bias=-3.0))
    assert all(bias.shape == (2,) for bias in biases(model))
    with torch.no_grad():
        for bias in biases(model):
            bias.fill_(-40.0)
    tokens = torch.randint(30, (1, 50))
    expected = model(tokens).logits
    with hide_sources(model, ["bank"]):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    fresh = MemoryTransformer(30, dim=8, depth=1, heads=2, memories=[MEMORIES["bank"]])
    assert [bias.tolist() for bias in biases(fresh)] == [[-1.0, -1.0]]


def test_gates_and_biases_work_together() -> None:
    model = build(MEMORIES["bank"], gated_memory=True).double()
    tokens = torch.randint(30, (1, 50))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.gate.fill_(0.3)  # type: ignore[union-attr, operator]
    decoder = Decoder(model, model.init_state(1))
    logits = torch.stack([decoder.step(token) for token in tokens.T], dim=1)
    assert (logits - model(tokens).logits).abs().max() < 1e-10
    assert set(model.memory_parameters()) >= {f"blocks.{layer}.attention.entry_bias" for layer in (0, 1)}


@pytest.mark.parametrize(
    "options", [{"near_window": 8}, {"near_window": 0}, {"entry_bias": -3.0}, {"near_window": 4, "same_length": False}]
)
def test_a_near_window_lies_inside_the_window(options: dict[str, Any]) -> None:
    with pytest.raises(MemtxError, match=r"near_window|entry_bias"):
        RecurrentMemory(8, window=8, **options)
    assert ErnieDocMemory(8, window=8).has_bank is False
