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


def unrolled(reader: MemoryTransformer, seed: int, segment: int, length: int, *, replay: bool) -> UnrollOutput:
    torch.manual_seed(seed)
    return unroll(reader, *texts(seed, 2, length), reader.init_state(2), segment_length=segment, replay=replay)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(segment=st.integers(1, 7), length=st.integers(1, 24), seed=st.integers(0, 99))
def test_gradients_equal_plain_backpropagation(kind: str, segment: int, length: int, seed: int) -> None:
    """Dropout and auxiliary losses included: what was drawn is drawn again."""
    torch.manual_seed(seed)
    reader = model(30, memories=(KINDS[kind](4, 2, 3),), dropout=0.2).double().train()
    plain = unrolled(reader, seed, segment, length, replay=False)
    expected = gradients(reader, plain.loss)
    result = unrolled(reader, seed, segment, length, replay=True)
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(result.nll, plain.nll)
    assert result.state.equals(plain.state)
    for name, item in gradients(reader, result.loss).items():
        torch.testing.assert_close(item, expected[name], **EXACT)


def peak(reader: MemoryTransformer, num_segments: int, *, replay: bool) -> int:
    # Gradients of weights are there already, as from the second segment on.
    unrolled(reader, 0, 16, 16, replay=False).loss.backward()  # type: ignore[no-untyped-call]
    reader.zero_grad(set_to_none=False)
    with TensorMemoryTracker() as alive:
        unrolled(reader, 0, 16, 16 * num_segments, replay=replay).loss.backward()  # type: ignore[no-untyped-call]
    return alive.peak


@pytest.mark.parametrize("kind", ["recurrent", "compressed-convolution", "associative", "slots"])
def test_replay_stores_states_only(kind: str) -> None:
    reader = model(30, memories=(KINDS[kind](8, 8, 3),), dim=32)
    state = reader.init_state(2).nbytes
    item, many = (peak(reader, num_segments, replay=True) for num_segments in (2, 16))
    # Fourteen states more, each with its tokens and the random state that dropout may be drawn from again.
    random, batch = torch.get_rng_state().numel(), 2 * 16 * (8 + 8 + 1 + 4)
    assert many - item < 14 * 1.1 * (state + random + batch)
    assert peak(reader, 16, replay=False) > 5 * many


def test_replay_does_not_change_a_run(tmp_path: Any) -> None:
    saved = []
    for replay in (False, True):
        taught, record = module(replay=replay), Record()
        run = trainer(tmp_path, record, max_steps=4, val_check_interval=4)
        run.fit(taught, datamodule=data(tmp_path, bptt_segments=3))
        saved.append((record.losses, record.results, weights(taught)))
    assert saved[0][:2] == saved[1][:2]
    for name, tensor in saved[0][2].items():
        assert torch.equal(saved[1][2][name], tensor), name
