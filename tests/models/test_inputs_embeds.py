"""Vectors in place of tokens: the same numbers as tokens, under any segmentation, with documents and padding."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import CompressedMemory, CopyMemory, MemoryTransformer, TransformerXL
from memtx.errors import MemtxError
from memtx.layers.positions.absolute import LearnedPositions
from tests.invariants.strategies import cases, distance, read, segment_bounds

EXACT = 1e-10
"""float64: sums in another order, about ten thousand operations deep."""


@pytest.mark.parametrize("kind", ["recurrent", "compressed-mean", "tokens", "gated-delta-net"])
@settings(max_examples=3)
@given(data=st.data())
def test_embeddings_of_tokens_equal_tokens_under_any_segmentation(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    expected, expected_state = read(case)
    embeddings, state, outputs = case.model.embedding(case.tokens), None, []
    for start, stop in itertools.pairwise(data.draw(segment_bounds(case.length))):
        starts_in_segment = case.document_starts[:, start:stop]
        out = case.model(None, state, inputs_embeds=embeddings[:, start:stop], document_starts=starts_in_segment)
        state = out.state
        outputs.append(out.logits)
    assert (expected - torch.cat(outputs, dim=1)).abs().max() < EXACT
    assert distance(expected_state, state) < EXACT


MODELS = {
    "scaled": lambda: MemoryTransformer(7, dim=8, depth=2, heads=2, embedding_scale=3.0),
    "absolute": lambda: MemoryTransformer(
        7, dim=8, depth=2, heads=2, absolute_positions=partial(LearnedPositions, num_positions=16)
    ),
    "transformer-xl": lambda: TransformerXL(7, dim=8, depth=2, heads=2, memory_length=4),
    "clusters": lambda: TransformerXL(7, dim=8, depth=2, heads=2, memory_length=4, cutoffs=[3], div_value=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_embedding_can_be_replaced(name: str) -> None:
    model = MODELS[name]().double().eval()
    tokens, labels = torch.randint(0, 7, (2, 9)), torch.randint(0, 7, (2, 9))
    expected = model(tokens, labels=labels)
    out = model(inputs_embeds=model.embedding(tokens), labels=labels)
    assert torch.equal(out.nll, expected.nll)
    assert distance(out.state, expected.state) == 0.0


def test_padding_and_gradient() -> None:
    model = MemoryTransformer(7, dim=8, depth=2, heads=2, memories=[partial(CompressedMemory, window=4)]).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=x).logits[:, 3].sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :4] != 0).any(-1).all()
    assert (x.grad[:, 4:] == 0).all()  # causal
    model.eval()
    valid_length = torch.tensor([4, 0])
    padded = model(inputs_embeds=x.detach(), valid_length=valid_length)
    alone = model(inputs_embeds=x[:1, :4].detach())
    assert torch.allclose(padded.logits[:1, :4], alone.logits, atol=EXACT)
    fresh = model.init_state(2)
    assert distance(padded.state, type(fresh).concat([alone.state, fresh.select([1])])) < EXACT


def test_embeddings_in_another_dtype_are_cast() -> None:
    model = MemoryTransformer(7, dim=8, depth=1, heads=2).to(torch.bfloat16).eval()
    assert model(inputs_embeds=torch.randn(1, 3, 8)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Neither of tokens and inputs_embeds is given. Give one."),
        ({"tokens": torch.zeros(1, 2, dtype=torch.int64), "inputs_embeds": torch.zeros(1, 2, 8)}, "Both of tokens and"),
        ({"inputs_embeds": torch.zeros(1, 2, 7)}, r"inputs_embeds is torch.float32 \(1, 2, 7\), expected .*length, 8"),
        ({"inputs_embeds": torch.zeros(2, 8)}, r"for a single sequence use inputs_embeds\[None\]"),
        ({"inputs_embeds": torch.zeros(1, 0, 8)}, "length at least 1"),
        ({"inputs_embeds": torch.zeros(1, 2, 8, dtype=torch.int64)}, "expected floating-point"),
        ({"inputs_embeds": torch.zeros(1, 2, 8), "labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels is"),
        ({"inputs_embeds": torch.zeros(1, 2, 8), "valid_length": torch.tensor([3])}, "valid_length is"),
    ],
)
def test_a_wrong_input_is_refused(inputs: dict[str, torch.Tensor], message: str) -> None:
    model = MemoryTransformer(7, dim=8, depth=1, heads=2).eval()
    with pytest.raises(MemtxError, match=message):
        model(**inputs)


def test_a_copy_memory_needs_tokens_and_a_state_must_fit() -> None:
    model = MemoryTransformer(7, dim=8, depth=1, heads=2, output_memory=CopyMemory).eval()
    with pytest.raises(MemtxError, match="copies token ids"):
        model(inputs_embeds=torch.zeros(1, 2, 8))
    plain = MemoryTransformer(7, dim=8, depth=1, heads=2).eval()
    with pytest.raises(MemtxError, match="batch size 2, the state 1"):
        plain(inputs_embeds=torch.zeros(2, 2, 8), state=plain.init_state(1))
