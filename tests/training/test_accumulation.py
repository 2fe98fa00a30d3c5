"""Accumulated gradients by step: full sums, exact resumption, and the length of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from memtx.checkpoint import trainer_state
from memtx.checkpoint.training import BestCheckpoint
from memtx.errors import MemtxError
from memtx.training.callbacks.accumulation import AccumulationSchedule
from tests.training.small import Record, assert_equal, data, module, trainer, weights
from tests.training.test_resume import Copy


class Counts(pl.Callback):
    """Batches of each optimizer step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.batches = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches += 1
        if trainer_state.has_stepped(trainer):
            self.counts.append(self.batches)
            self.batches = 0


@pytest.mark.parametrize(
    ("schedule", "options", "counts"),
    [
        ({0: 1, 4: 2}, {"max_steps": 7}, [1, 1, 1, 1, 2, 2, 2]),
        # 3 batches are no multiple of 2, so the new number begins after the next.
        ({3: 2}, {"max_steps": 6}, [1, 1, 1, 1, 2, 2]),
        ({0: 2, 2: 1}, {"max_steps": 4}, [2, 2, 1, 1]),
        # An epoch ends with a step, however few batches are left.
        ({2: 2}, {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}, [1, 1, 2, 1, 2, 2, 1]),
    ],
)
def test_every_step_sums_its_batches(
    tmp_path: Path, schedule: dict[int, int], options: dict[str, Any], counts: list[int]
) -> None:
    record, callback = Counts(), AccumulationSchedule(schedule)
    run = trainer(tmp_path, callback, record, limit_val_batches=0, **options)
    run.fit(module(), datamodule=data(tmp_path))
    assert record.counts == counts
    if (epochs := options.get("max_epochs")) is not None:
        assert trainer_state.total_steps(run) == callback.count_steps(5, epochs) == len(counts)
    else:
        assert callback.count_batches(len(counts)) == sum(counts)


def epochs(factor: dict[int, int]) -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler(factor)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: AccumulationSchedule({0: 1, 3: 2}), {"max_steps": 8}),
        (lambda: epochs({0: 1, 1: 2}), {"max_steps": 9, "limit_train_batches": 5}),
    ],
)
def test_a_run_resumes_with_the_same_number(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    last = tmp_path / "run" / "last.ckpt"
    copies = {batch: tmp_path / f"{batch}.ckpt" for batch in (3, 8, 10)}
    full, record = module(), Record()
    keep = BestCheckpoint(str(last.parent), every_n_train_steps=1)
    trainer(tmp_path, make(), record, Copy(last, copies), keep, limit_val_batches=0, **options).fit(
        full, datamodule=data(tmp_path)
    )
    for copy in copies.values():
        resumed, resumed_record = module(seed=7), Record()
        run = trainer(tmp_path, make(), resumed_record, limit_val_batches=0, **options)
        run.fit(resumed, datamodule=data(tmp_path), ckpt_path=str(copy))
        first = min(resumed_record.losses)
        assert resumed_record.losses == {batch: loss for batch, loss in record.losses.items() if batch >= first}
        assert_equal(weights(resumed), weights(full))


def test_two_numbers_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, AccumulationSchedule({2: 2}), accumulate_grad_batches=3, max_steps=2)
    with pytest.raises(MemtxError, match="accumulate_grad_batches is 3 beside a schedule"):
        run.fit(module(), datamodule=data(tmp_path))
    with pytest.raises(MemtxError, match="0 batches per step from step 5"):
        AccumulationSchedule({5: 0})
