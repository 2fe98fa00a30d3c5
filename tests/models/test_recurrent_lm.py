"""Recurrent language models implement the protocol."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memtx import MemoryTransformer, TransformerXL
from memtx.models.recurrent_lm import MemoryOutput, RecurrentLanguageModel
from memtx.state import MemoryState

TOKENS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def float_tensors(state: MemoryState) -> list[torch.Tensor]:
    return [tensor for tensor in state.named_tensors().values() if tensor.is_floating_point()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fresh_state_has_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    model = MemoryTransformer(20, dim=8, depth=1, heads=2).to(dtype)
    assert {tensor.dtype for tensor in float_tensors(model.init_state(2))} == {dtype}


@pytest.mark.parametrize("model_class", [MemoryTransformer, TransformerXL])
def test_models_fit_the_protocol(model_class: Any) -> None:
    model: RecurrentLanguageModel = model_class(20, dim=8, depth=2, heads=2).eval()
    assert model.vocab_size == 20
    assert len(model.fingerprint) == 64
    state = model.init_state(2, dtype=torch.float64, device=torch.device("cpu"))
    assert (state.batch_size, state.position.device.type) == (2, "cpu")
    assert {tensor.dtype for tensor in float_tensors(state)} == {torch.float64}
    assert {tensor.dtype for tensor in float_tensors(model.init_state(2))} == {torch.float32}
    document_starts = torch.zeros_like(TOKENS, dtype=torch.bool)
    state = model(TOKENS, model.init_state(2), document_starts=document_starts).state
    output = model(TOKENS, state, document_starts=document_starts, labels=TOKENS, return_hidden_states=True)
    assert isinstance(output, MemoryOutput)
    assert output.state.position.tolist() == [18, 18]
    assert output.loss is not None
    assert output.nll is not None
    assert output.nll.shape == (2, 9)
    assert [tuple(hidden.shape) for hidden in output.hidden_states or ()] == [(2, 9, 8)] * 3
