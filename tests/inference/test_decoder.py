"""Decoding in place equals calls of the model with one token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import MemoryTransformer
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.memory.kv_ring import DecodeStep, KVRing, RingLayout
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.transformer_xl import TransformerXL
from memtx.state import MemoryState
from tests.invariants.strategies import cases, distance
from tests.memory_zoo import KINDS

EXACT = 1e-10
"""float64: sums in another order."""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_decoding_equals_calls_of_the_model(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    length = case.tokens.shape[1]
    start = data.draw(st.integers(0, length))
    # The streams are at different positions: some documents begin inside the tokens read so far.
    state = case.model.init_state(case.tokens.shape[0])
    if start:
        state = case.model(case.tokens[:, :start], state, document_starts=case.document_starts[:, :start]).state
    before = state.map(torch.Tensor.clone)
    decoder = Decoder(case.model, state)
    assert distance(decoder.state, state) == 0
    expected_state = state
    for index in range(start, length):
        expected = case.model(case.tokens[:, index : index + 1], expected_state)
        expected_state = expected.state
        assert (decoder.step(case.tokens[:, index]) - expected.logits[:, 0]).abs().max() < EXACT
    assert distance(decoder.state, expected_state) < EXACT
    assert state.equals(before)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_streams_that_join_and_leave_equal_each_alone(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    states_alone = {}
    decoder, stream_ids = None, []
    for step in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()) or decoder is None:
            # A stream that has read some tokens by itself joins.
            length = data.draw(st.integers(0, 40))
            state = case.model.init_state(1)
            state = case.model(torch.randint(0, 11, (1, length)), state).state if length else state
            states_alone[step] = state
            if decoder is None:
                decoder = Decoder(case.model, state)
            else:
                decoder.append(state)
            stream_ids.append(step)
        elif data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(stream_ids))))
            indices = order[: data.draw(st.integers(0, len(stream_ids)))]
            decoder.select(indices)
            stream_ids = [stream_ids[index] for index in indices]
        tokens = torch.randint(0, 11, (len(stream_ids),))
        logits = decoder.step(tokens)
        assert logits.shape == (len(stream_ids), 11)
        for index, stream_id in enumerate(stream_ids):
            expected = case.model(tokens[index : index + 1, None], states_alone[stream_id])
            states_alone[stream_id] = expected.state
            assert (logits[index] - expected.logits[0, 0]).abs().max() < EXACT
    for index, stream_id in enumerate(stream_ids):
        assert distance(decoder.state.select([index]), states_alone[stream_id]) < EXACT


def small_model(*memories: object) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(11, dim=8, depth=2, heads=2, memories=memories).eval()  # type: ignore[arg-type]


def state_at(model: MemoryTransformer, position: int) -> MemoryState:
    state = model(torch.arange(40)[None] % 11).state
    return MemoryState(torch.tensor([position]), state.layers)


@pytest.mark.parametrize("position", [40, 2_000, 10_000_000])
def test_rotary_angles_stay_exact_at_large_positions(position: int) -> None:
    # float32: angles of absolute positions are computed in float64, so large positions add no error.
    model = small_model(partial(CompressedMemory, window=8, compression_rate=2, num_entries=4))
    decoder, state = Decoder(model, state_at(model, position)), state_at(model, position)
    for token in (torch.arange(30) % 11)[:, None]:
        expected = model(token[None], state)
        state = expected.state
        assert (decoder.step(token) - expected.logits[:, 0]).abs().max() < 1e-5


def test_layers_can_have_different_memories() -> None:
    model = small_model(
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
def test_memories_without_a_ring_are_decoded_by_calls(memory: object) -> None:
    model = small_model(memory)
    decoder, state = Decoder(model, model.init_state(1)), model.init_state(1)
    for tokens in torch.randint(0, 11, (6, 1)):
        expected = model(tokens[:, None], state)
        state = expected.state
        assert torch.equal(decoder.step(tokens), expected.logits[:, 0])
    assert decoder.state.equals(state)


def test_other_language_models_are_decoded_by_calls() -> None:
    torch.manual_seed(0)
    model = TransformerXL(11, dim=8, depth=2, heads=2, memory_length=4).train()
    decoder, state = Decoder(model, model.init_state(2)), model.init_state(2)
    assert not model.training
    for tokens in torch.randint(0, 11, (6, 2)):
        expected = model(tokens[:, None], state)
        state = expected.state
        assert torch.equal(decoder.step(tokens), expected.logits[:, 0])
    decoder.append(state.select([0]))
    decoder.select([2, 1])
    assert decoder.state.equals(state)


@pytest.mark.parametrize("memory", [NoMemory, partial(RecurrentMemory, window=4, same_length=False)])
def test_streams_without_a_ring_join_and_leave_too(memory: object) -> None:
    model = small_model(memory).double()
    first, second = (model(torch.randint(0, 11, (1, length))).state for length in (3, 7))
    decoder = Decoder(model, first)
    decoder.append(second)
    decoder.select([1])
    expected = model(torch.tensor([[5]]), second)
    assert (decoder.step(torch.tensor([5])) - expected.logits[:, 0]).abs().max() < EXACT
    decoder.select([])
    assert decoder.step(torch.empty(0, dtype=torch.int64)).shape == (0, 11)
    decoder.append(expected.state)
    assert distance(decoder.state, expected.state) == 0.0


def test_a_step_is_compiled_twice_and_never_again() -> None:
    # Once for steps that evict a block and once for the others, however full the memory is.
    model = small_model(partial(CompressedMemory, window=6, compression_rate=3, num_entries=4))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    decoder = Decoder(model, model.init_state(1), torch_compile=counter)
    plain = Decoder(model, model.init_state(1))
    for tokens in torch.randint(0, 11, (40, 1)):
        assert torch.allclose(decoder.step(tokens), plain.step(tokens), atol=1e-5)
    assert counter.frame_count == 2


def test_invalid_arguments_are_reported() -> None:
    model = small_model(partial(RecurrentMemory, window=4))
    with pytest.raises(MemtxError, match=r"tokens is \(3,\), expected \(2,\)"):
        Decoder(model, model.init_state(2)).step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(MemtxError, match=r"select got \[0, 0\] for 2 streams"):
        Decoder(model, model.init_state(2)).select([0, 0])
    with pytest.raises(MemtxError, match=r"use_cuda_graph=True needs a GPU.* cpu"):
        Decoder(model, model.init_state(1), use_cuda_graph=True)


@pytest.mark.parametrize("num_entries", [0, 4])
def test_captures_share_a_pool_and_restore_the_rings(num_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU in name, where nothing runs during a capture: the warmup leaves no trace."""
    torch.manual_seed(0)
    memory = partial(CompressedMemory, window=24, compression_rate=4, num_entries=num_entries)
    model = MemoryTransformer(20, dim=8, depth=2, heads=2, memories=[memory])
    tokens = torch.randint(0, 20, (2, 50))
    with torch.inference_mode():
        decoder = Decoder(model, model(tokens).state)
    decoder._use_cuda_graph = True
    buffers = [decoder._position, *(buffer for ring in decoder._rings for buffer in ring.buffers)]
    captures: list[tuple[object, str]] = []

    @contextlib.contextmanager
    def capture(graph: object, pool: object, capture_error_mode: str) -> Iterator[None]:
        captures.append((pool, capture_error_mode))
        saved = [buffer.clone() for buffer in buffers]
        yield
        for buffer, content in zip(buffers, saved, strict=True):
            buffer.copy_(content)

    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    expected = [buffer.clone() for buffer in buffers]
    monkeypatch.setattr(torch.cuda, "graph", capture)
    with torch.inference_mode():
        for layouts in (frozenset(), frozenset(decoder._layouts)):
            decoder._build_step(layouts, tokens[:, 0])
    for buffer, content in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, content)
    assert [mode for _, mode in captures] == ["thread_local"] * 2
    assert captures[0][0] is captures[1][0]


def test_a_snapshot_of_a_ring_is_two_slots_of_each_stream() -> None:
    layout = RingLayout(window=24, compression_rate=4, num_entries=6, cache_length=27)
    position, buffers = torch.tensor([30, 7, 51]), (torch.randn(3, 33, 4), torch.randn(3, 33, 2, 1, 4))
    expected = [buffer.clone() for buffer in buffers]
    restore = KVRing(buffers, layout=layout).snapshot(position)
    changed = [cell.cell_contents for cell in restore.__closure__ or ()]
    saved = next(content for content in changed if isinstance(content, list))
    assert [tensor.shape[:2] for tensor in saved] == [(3, 2)] * 2
    plan = DecodeStep(position, frozenset([layout])).plan(layout)
    for buffer in buffers:
        buffer[torch.arange(3), plan.slot] = 0.0
        buffer[torch.arange(3), plan.bank_slot] = 0.0
    restore()
    for buffer, content in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, content)
