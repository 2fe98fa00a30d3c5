"""Random state resets in training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from memtx.errors import MemtxError
from memtx.memory.associative import AssociativeMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.sinks import SinkMemory
from memtx.memory.slots import SlotMemory
from memtx.memory.top_k import TopKMemory
from memtx.state import MemoryState
from memtx.training.carry import StateReset
from memtx.training.language import LanguageModule
from tests.training.small import Record, data, model, module, sgd, trainer

CACHE = partial(RecurrentMemory, window=6)


@pytest.mark.parametrize(
    ("kinds", "unbounded"),
    [
        ([NoMemory], False),
        ([CACHE], False),
        ([partial(CompressedMemory, window=6, compression_rate=2, num_entries=3)], False),
        ([CACHE, partial(RetrievalMemory, capacity=12, exclude_recent=6, top_k=2)], False),
        ([CACHE, AssociativeMemory], True),
        ([CACHE, partial(SlotMemory, num_slots=2, interval=6)], True),
        ([CACHE, partial(TokenMemory, num_tokens=2, interval=6)], True),
        ([CACHE, partial(SinkMemory, num_sinks=2)], True),
        ([partial(TopKMemory, window=6, compression_rate=1, num_entries=6)], True),
    ],
)
def test_unbounded_memories_are_reset_by_default(kinds: list[Any], unbounded: bool) -> None:
    make = partial(model, memories=[kinds])
    assert LanguageModule(make).state_reset.prob == (0.05 if unbounded else 0.0)
    assert LanguageModule(make, state_reset_prob=0.0).state_reset.prob == 0.0
    assert LanguageModule(make, state_reset_prob=0.5).state_reset.prob == 0.5
    for wrong in (-0.1, 1.1):
        with pytest.raises(MemtxError, match=f"state_reset_prob is {wrong}, expected a probability from 0 to 1"):
            LanguageModule(make, state_reset_prob=wrong)


def test_a_reset_step_ignores_the_step_before(tmp_path: Path) -> None:
    losses = {}
    for prob in (0.0, 1.0):
        frozen_module = module(optimizer=partial(sgd, lr=0.0), scheduler=None, dropout=0.0, state_reset_prob=prob)
        record = Record()
        trainer(tmp_path, record, max_steps=4, limit_val_batches=0).fit(frozen_module, data(tmp_path))
        losses[prob] = [float.fromhex(loss) for loss in record.losses.values()]
    books = data(tmp_path)
    books.setup("fit")
    for batch, loss in zip(books.train_dataloader(), losses[1.0], strict=False):
        state, nll, scored = frozen_module.model.init_state(2), 0.0, 0
        for part in (slice(0, 8), slice(8, 16)):
            out = frozen_module.model(
                batch.tokens[:, part],
                state,
                document_starts=batch.document_starts[:, part],
                labels=batch.labels[:, part],
            )
            state, nll = out.state, nll + float(out.nll.sum())
            scored += int((batch.labels[:, part] != -100).sum())
        # float32: sums in another order
        assert loss == pytest.approx(nll / scored, rel=1e-5)
    assert losses[0.0][0] == losses[1.0][0]
    assert losses[0.0][1:] != pytest.approx(losses[1.0][1:], rel=1e-4)  # differ by more than rounding


def test_processes_share_one_sample() -> None:
    decoder = model()
    reset = StateReset(decoder, 0.4)

    def sample(rank: int, world_size: int, batch_size: int, seed: int) -> list[bool]:
        fresh = decoder.init_state(batch_size)
        state = MemoryState(torch.full_like(fresh.position, 5), fresh.layers)
        state = reset(state, seed=seed, rank=rank, world_size=world_size)
        return cast(list[bool], (state.position == 0).tolist())

    steps = [sample(0, 1, 6, 96 * step) for step in range(50)]
    assert steps == [sample(0, 2, 3, 96 * step) + sample(1, 2, 3, 96 * step) for step in range(50)]
    # 300 samples of 0.4: five standard deviations are 0.14.
    assert 0.26 < sum(map(sum, steps)) / 300 < 0.54
