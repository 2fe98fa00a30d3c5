"""Replay: the gradients of plain back-propagation through time, and the memory of one segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import UnrollOutput, unroll
from scripts.benchmarking import TensorMemoryTracker
from tests.memory_zoo import KINDS
from tests.training.small import Record, data, model, module, trainer, weights
from tests.training.test_tbptt import gradients, texts

# float64: the same operations a second time; only sums over segments may be taken in another order.
EXACT: Any = {"atol": 1e-12, "rtol": 1e-9}


def unrolled(decoder: MemoryTransformer, seed: int, segment: int, length: int, *, replay: bool) -> UnrollOutput:
    torch.manual_seed(seed)
    return unroll(decoder, *texts(seed, 2, length), decoder.init_state(2), segment_length=segment, replay=replay)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(segment=st.integers(1, 7), length=st.integers(1, 24), seed=st.integers(0, 99))
def test_gradients_equal_plain_backpropagation(kind: str, segment: int, length: int, seed: int) -> None:
    """Dropout and auxiliary losses included: the second pass draws the same random numbers."""
    torch.manual_seed(seed)
    decoder = model(30, memories=(KINDS[kind](4, 2, 3),), dropout=0.2).double().train()
    plain = unrolled(decoder, seed, segment, length, replay=False)
    expected = gradients(decoder, plain.loss)
    replayed = unrolled(decoder, seed, segment, length, replay=True)
    assert torch.equal(replayed.loss, plain.loss)
    assert torch.equal(replayed.nll, plain.nll)
    assert replayed.state.equals(plain.state)
    for name, gradient in gradients(decoder, replayed.loss).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def peak(decoder: MemoryTransformer, num_segments: int, *, replay: bool) -> int:
    # Gradients of weights are there already, as from the second segment on.
    unrolled(decoder, 0, 16, 16, replay=False).loss.backward()  # type: ignore[no-untyped-call]
    decoder.zero_grad(set_to_none=False)
    with TensorMemoryTracker() as alive:
        unrolled(decoder, 0, 16, 16 * num_segments, replay=replay).loss.backward()  # type: ignore[no-untyped-call]
    return alive.peak


@pytest.mark.parametrize("kind", ["recurrent", "compressed-convolution", "associative", "slots"])
def test_replay_stores_states_only(kind: str) -> None:
    decoder = model(30, memories=(KINDS[kind](8, 8, 3),), dim=32)
    state = decoder.init_state(2).nbytes
    few, many = (peak(decoder, num_segments, replay=True) for num_segments in (2, 16))
    # Fourteen states more, each with its tokens and the random state that dropout may be drawn from again.
    rng_state, batch = torch.get_rng_state().numel(), 2 * 16 * (8 + 8 + 1 + 4)
    assert many - few < 14 * 1.1 * (state + rng_state + batch)
    assert peak(decoder, 16, replay=False) > 5 * many


def test_replay_does_not_change_a_run(tmp_path: Any) -> None:
    runs = []
    for replay in (False, True):
        language_module, record = module(replay=replay), Record()
        run = trainer(tmp_path, record, max_steps=4, val_check_interval=4)
        run.fit(language_module, datamodule=data(tmp_path, bptt_segments=3))
        runs.append((record.losses, record.results, weights(language_module)))
    assert runs[0][:2] == runs[1][:2]
    for name, tensor in runs[0][2].items():
        assert torch.equal(runs[1][2][name], tensor), name
