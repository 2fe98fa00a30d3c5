"""A model without a source computes what a model built without it does, and shares its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx import MemoryTransformer, MemtxError, list_sources, without_source
from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.sources import hide_sources
from tests.invariants.strategies import VOCAB_SIZE, Case, cases, distance, read, segment_bounds
from tests.memory_zoo import KINDS, Stack, output_memory

EXPECTED = {
    "recurrent": [],
    "compressed-mean": ["bank"],
    "recurrent-entry-bias": ["cache"],
    "top-k": ["bank"],
    "dual": ["bank", "associative"],
    "slots": ["slot"],
    "retrieval": ["retrieval"],
    "sinks": ["sink"],
    "tokens": ["token"],
    "gated-delta-net": ["gated_delta_net"],
    "third-party": ["running_mean"],
    "readme": ["average"],
    "copy": ["copy"],
}


def build(stack: Stack, copy: Any = None) -> MemoryTransformer:
    return MemoryTransformer(VOCAB_SIZE, dim=8, depth=2, heads=2, memories=[stack], output_memory=copy).eval()


@pytest.mark.parametrize(("kind", "sources"), EXPECTED.items())
def test_sources_have_the_names_of_their_kinds(kind: str, sources: list[str]) -> None:
    assert list_sources(build(KINDS[kind](4, 2, 3), output_memory(kind, 4, 2))) == sources


def without_all(case: Case) -> Case:
    reduced = case.model
    for source in list_sources(reduced):
        reduced = without_source(reduced, source)
    return Case(reduced, case.tokens, case.document_starts, case.description)


# Kinds whose exact part is their spans or their segment, or that have none.
WITHOUT_WINDOW = {"recurrent-expire-span", "ernie-doc", "gated-delta-net", "gated-delta-net-channel", "rmt", "armt"}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - WITHOUT_WINDOW))
@given(data=st.data())
@settings(max_examples=8)
def test_without_all_sources_the_window_remains(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    before = read(case)[0]
    reduced = without_all(case)
    logits, _ = read(reduced, data.draw(segment_bounds(case.length)))
    assert torch.equal(before, read(case)[0])

    def as_window(block: torch.nn.Module) -> partial[RecurrentMemory] | partial[CompressedMemory]:
        memory = block.attention.memory  # type: ignore[union-attr]
        if isinstance(memory, CompressedMemory):
            rate = memory.compression_rate
            return partial(CompressedMemory, window=memory.window, compression_rate=rate, num_entries=0)
        dilation = {} if memory.dilation == 1 else {"dilation": memory.dilation}  # type: ignore[union-attr]
        return partial(type(memory), window=memory.near_window or memory.window, **dilation)  # type: ignore[call-arg, arg-type]

    window = MemoryTransformer(
        VOCAB_SIZE, dim=8, depth=2, heads=2, kv_heads=case.model.blocks[0].attention.kv_heads,  # type: ignore[arg-type, union-attr]
        memories=[as_window(case.model.blocks[0])], feed_forward=partial(type(case.model.blocks[0].feed_forward)),  # type: ignore[arg-type]
        positions=type(case.model.blocks[0].attention.positions),  # type: ignore[arg-type, union-attr]
    ).double().eval()  # fmt: skip
    window.load_state_dict(case.model.state_dict(), strict=False)
    # Memory tokens and outputs end a call elsewhere, which reorders sums.
    expected = read(Case(window, case.tokens, case.document_starts, ""))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_the_copy_shares_weights_and_states_with_the_model() -> None:
    model = build(KINDS["dual"](3, 2, 2))
    reduced = without_source(model, "bank")
    assert list_sources(reduced) == list_sources(model)
    weights: dict[str, Tensor] = dict(reduced.named_parameters())
    assert all(weights[name] is weight for name, weight in model.named_parameters())
    tokens = torch.randint(VOCAB_SIZE, (2, 20))
    state = model(tokens).state
    assert reduced(tokens, state).state.named_tensors().keys() == state.named_tensors().keys()


@pytest.mark.parametrize("kind", ["compressed-mean", "recurrent-entry-bias", "copy", "gated-delta-net", "dual"])
@given(data=st.data())
@settings(max_examples=8)
def test_decoding_hides_the_source(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    reduced = without_source(case.model, list_sources(case.model)[0])
    state = reduced.init_state(len(case.tokens))
    decoder = Decoder(reduced, state)
    for token in case.tokens.T:
        expected = reduced(token[:, None], state)
        state = expected.state
        assert (decoder.step(token) - expected.logits[:, 0]).abs().max() < 1e-10
    assert distance(decoder.state, state) < 1e-10


def test_hiding_ends_with_its_context() -> None:
    model, tokens = build(KINDS["compressed-mean"](3, 2, 4)), torch.randint(VOCAB_SIZE, (1, 30))
    before = model(tokens).logits
    with hide_sources(model, ["bank"]):
        assert torch.equal(model(tokens).logits, without_source(model, "bank")(tokens).logits)
        assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)


def test_a_memory_in_place_of_attention_reads_each_call_alone() -> None:
    model, tokens = build(partial(GatedDeltaNet, heads=2)), torch.randint(VOCAB_SIZE, (1, 12))
    state = model(tokens).state
    reduced = without_source(model, "gated_delta_net")
    assert torch.equal(reduced(tokens, state).logits, model(tokens).logits)
    assert not torch.equal(model(tokens, state).logits, model(tokens).logits)


@pytest.mark.parametrize(("kind", "hint"), [("dual", "bank, associative"), ("recurrent", "exact window alone")])
def test_an_unknown_source_is_refused(kind: str, hint: str) -> None:
    with pytest.raises(MemtxError, match="no source 'cache'") as error:
        without_source(build(KINDS[kind](3, 2, 2)), "cache")
    assert hint in str(error.value)
