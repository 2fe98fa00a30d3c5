"""A model read with another memory is the model built with that memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from memtx import CompressedMemory, ErnieDocMemory, LanguageModule, MemoryTransformer, RecurrentMemory, TransformerXL
from memtx.errors import MemtxError
from memtx.models.memory_length import memory_length, set_memory_length

TOKENS = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(0))


def read(model: MemoryTransformer, length: int) -> torch.Tensor:
    state, logits = None, []
    for part in TOKENS.split(length, dim=1):
        output = model(part, state)
        state = output.state
        assert output.logits is not None
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def transformer_xl(**options: Any) -> TransformerXL:
    torch.manual_seed(0)
    model = TransformerXL(30, dim=8, depth=2, heads=2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def test_transformer_xl_is_tested_with_a_longer_memory() -> None:
    trained = transformer_xl(memory_length=4)
    expected = read(transformer_xl(memory_length=12, same_length=True, clamp_length=6), 5)
    before = read(trained, 5)
    assert not torch.allclose(before, expected)
    with memory_length(trained, 12, clamp_length=6, same_length=True):
        torch.testing.assert_close(read(trained, 5), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(read(trained, 7), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(read(trained, 5), before, rtol=0, atol=0)


def test_a_window_is_widened() -> None:
    def build(window: int) -> MemoryTransformer:
        torch.manual_seed(0)
        memory = partial(RecurrentMemory, window=window)
        return MemoryTransformer(30, dim=8, depth=2, heads=2, memories=[memory]).double().eval()

    model, expected = build(4), read(build(9), 5)
    with memory_length(model, 9, clamp_length=None, same_length=None):
        torch.testing.assert_close(read(model, 5), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [CompressedMemory, partial(ErnieDocMemory, window=8, interval=4)])
def test_other_memories_are_refused_when_the_module_is_built(memory: Any) -> None:
    model = partial(MemoryTransformer, dim=8, depth=1, heads=2, memories=[memory])
    with pytest.raises(MemtxError, match="memory length was given, but a layer has a"):
        LanguageModule(model, 30, eval_memory=16)
    with pytest.raises(MemtxError, match="clamp_length"):
        LanguageModule(model, 30, clamp=16)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(MemtxError, match="memory_length is 0"):
        set_memory_length(transformer_xl(memory_length=4), 0, same_length=True)
