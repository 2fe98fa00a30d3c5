"""The decoder keeps keys and values and computes what calls of one token compute."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import MemoryTransformer
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.state import MemoryState
from tests.invariants.strategies import cases, distance
from tests.memory_zoo import KINDS

EXACT = 1e-10
"""float64: sums in another order."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_it_goes_on_as_the_model_does(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    n = case.tokens.shape[1]
    begin = data.draw(st.integers(0, n))
    # Rows at different places: some documents begin inside what was read.
    state = case.model.init_state(case.tokens.shape[0])
    if begin:
        state = case.model(case.tokens[:, :begin], state, document_starts=case.document_starts[:, :begin]).state
    before = state.map(torch.Tensor.clone)
    decoder = Decoder(case.model, state)
    assert distance(decoder.state, state) == 0
    going = state
    for at in range(begin, n):
        expected = case.model(case.tokens[:, at : at + 1], going)
        going = expected.state
        assert (decoder.step(case.tokens[:, at]) - expected.logits[:, 0]).abs().max() < EXACT
    assert distance(decoder.state, going) < EXACT
    assert state.equals(before)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_rows_that_come_and_go_read_as_each_alone(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    alone = {}
    decoder, names = None, []
    for step in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()) or decoder is None:
            # A stream that has read some tokens by itself joins.
            at = data.draw(st.integers(0, 40))
            state = case.model.init_state(1)
            state = case.model(torch.randint(0, 11, (1, at)), state).state if at else state
            alone[step] = state
            if decoder is None:
                decoder = Decoder(case.model, state)
            else:
                decoder.append(state)
            names.append(step)
        elif data.draw(st.booleans()):
            kept = data.draw(st.permutations(range(len(names))))[: data.draw(st.integers(0, len(names)))]
            decoder.select(kept)
            names = [names[row] for row in kept]
        tokens = torch.randint(0, 11, (len(names),))
        logits = decoder.step(tokens)
        assert logits.shape == (len(names), 11)
        for row, name in enumerate(names):
            expected = case.model(tokens[row : row + 1, None], alone[name])
            alone[name] = expected.state
            assert (logits[row] - expected.logits[0, 0]).abs().max() < EXACT
    for row, name in enumerate(names):
        assert distance(decoder.state.select([row]), alone[name]) < EXACT


def small(*memories: object) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories).eval()  # type: ignore[arg-type]


def far(model: MemoryTransformer, position: int) -> MemoryState:
    state = model(torch.arange(40)[None] % 11).state
    return MemoryState(torch.tensor([position]), state.layers)


@pytest.mark.parametrize("position", [40, 2_000, 10_000_000])
def test_angles_stay_true_far_away(position: int) -> None:
    # float32: angles of absolute positions are made in float64, so distance from the beginning adds no error.
    model = small(partial(CompressedMemory, window=8, compression_rate=2, num_entries=4))
    decoder, state = Decoder(model, far(model, position)), far(model, position)
    for token in (torch.arange(30) % 11)[:, None]:
        expected = model(token[None], state)
        state = expected.state
        assert (decoder.step(token) - expected.logits[:, 0]).abs().max() < 1e-5


def test_layers_of_different_memories() -> None:
    model = small(
        partial(RecurrentMemory, window=5), partial(CompressedMemory, window=3, compression_rate=3, num_entries=2)
    ).double()
    decoder, state = Decoder(model, model.init_state(2)), model.init_state(2)
    for tokens in torch.randint(0, 11, (30, 2)):
        expected = model(tokens[:, None], state)
        state = expected.state
        assert (decoder.step(tokens) - expected.logits[:, 0]).abs().max() < EXACT


@pytest.mark.parametrize(
    "memory",
    [
        NoMemory,
        partial(RecurrentMemory, window=4, same_length=False),
        partial(CompressedMemory, compress_per_segment=True),
    ],
)
def test_other_memories_are_decoded_by_calls(memory: object) -> None:
    model = small(memory)
    decoder, state = Decoder(model, model.init_state(1)), model.init_state(1)
    for tokens in torch.randint(0, 11, (6, 1)):
        expected = model(tokens[:, None], state)
        state = expected.state
        assert torch.equal(decoder.step(tokens), expected.logits[:, 0])
    assert decoder.state.equals(state)


@pytest.mark.parametrize("memory", [NoMemory, partial(RecurrentMemory, window=4, same_length=False)])
def test_rows_of_other_memories_come_and_go_too(memory: object) -> None:
    model = small(memory).double()
    first, second = (model(torch.randint(0, 11, (1, n))).state for n in (3, 7))
    decoder = Decoder(model, first)
    decoder.append(second)
    decoder.select([1])
    expected = model(torch.tensor([[5]]), second)
    assert (decoder.step(torch.tensor([5])) - expected.logits[:, 0]).abs().max() < EXACT
    decoder.select([])
    assert decoder.step(torch.empty(0, dtype=torch.int64)).shape == (0, 11)
    decoder.append(expected.state)
    assert distance(decoder.state, expected.state) == 0.0


def test_a_compiled_step_is_made_twice_and_never_again() -> None:
    # Once for steps in which a block crosses the edge, once for the others, however full the memory is.
    model = small(partial(CompressedMemory, window=6, compression_rate=3, num_entries=4))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    decoder = Decoder(model, model.init_state(1), torch_compile=counter)
    plain = Decoder(model, model.init_state(1))
    for tokens in torch.randint(0, 11, (40, 1)):
        assert torch.allclose(decoder.step(tokens), plain.step(tokens), atol=1e-5)
    assert counter.frame_count == 2


def test_mistakes_are_named() -> None:
    model = small(partial(RecurrentMemory, window=4))
    with pytest.raises(MemtxError, match=r"tokens is \(3,\), expected \(2,\)"):
        Decoder(model, model.init_state(2)).step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(MemtxError, match=r"select got \[0, 0\] of 2 rows"):
        Decoder(model, model.init_state(2)).select([0, 0])
    with pytest.raises(MemtxError, match="CUDA graphs need a GPU"):
        Decoder(model, model.init_state(1), use_cuda_graph=True)
