"""Promise 6: a run that was stopped anywhere resumes with the same losses and weights, bit for bit."""

from __future__ import annotations

import csv
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from memtx.checkpoint.training import BestCheckpoint
from memtx.training.lora import LoRA
from tests.commands.program import Program
from tests.commands.runs import changed
from tests.training import runs, small
from tests.training.small import Record, assert_equal, data, module, trainer


class Copy(pl.Callback):
    """Takes last.ckpt away as it is after a batch: what a run killed there leaves."""

    def __init__(self, source: Path, targets: dict[int, Path]) -> None:
        self.source, self.targets = source, targets

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx
        if done in self.targets and self.source.exists():
            shutil.copy(self.source, self.targets[done])


@pytest.mark.parametrize(
    ("options", "every", "kills"),
    [
        # Passes of the data end at 5, 10, 15; checkpoints fall on their ends, one before and one after.
        ({"limit_train_batches": 5, "val_check_interval": 4, "max_steps": 17}, 1, (3, 5, 6, 11)),
        ({"limit_train_batches": 5, "limit_val_batches": 0, "max_epochs": 3, "max_steps": -1}, 2, (5, 7)),
        ({"limit_train_batches": 5, "max_epochs": 3, "max_steps": -1, "check_val_every_n_epoch": 1}, None, (6, 11)),
        # Validation falls in the middle of an accumulation, and a pass ends with a short one.
        ({"accumulate_grad_batches": 3, "val_check_interval": 4, "max_steps": 7}, 2, (5, 9, 13)),
        (
            {"accumulate_grad_batches": 2, "limit_train_batches": 5, "val_check_interval": 3, "max_steps": 8},
            1,
            (4, 6, 8, 12),
        ),
        ({"precision": "bf16-mixed", "val_check_interval": 4, "max_steps": 8}, 3, (4, 7)),
    ],
)
def test_a_run_resumes_exactly_from_anywhere(
    tmp_path: Path, options: dict[str, Any], every: int | None, kills: tuple[int, ...]
) -> None:
    assert_resumes_exactly(tmp_path, options, every, kills)


def test_lora_beside_a_frozen_base_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra 'retrofit' is not installed")
    adapted = {"freeze_base": True, "lora": LoRA(rank=2, dropout=0.3)}
    assert_resumes_exactly(tmp_path, {"limit_val_batches": 0, "max_steps": 8}, 1, (3, 6), **adapted)


def assert_resumes_exactly(
    tmp_path: Path, options: dict[str, Any], every: int | None, kills: tuple[int, ...], **module_options: Any
) -> None:
    last = tmp_path / "run" / "last.ckpt"
    copies = {batch: tmp_path / f"{batch}.ckpt" for batch in kills}
    full, record = module(**module_options), Record()
    keep = BestCheckpoint(str(last.parent), every_n_train_steps=every)
    run = trainer(tmp_path, record, Copy(last, copies), keep, gradient_clip_val=1.0, **options)
    run.fit(full, datamodule=data(tmp_path))
    assert len(record.losses) >= 8
    compared = 0
    for copy in copies.values():
        if not copy.exists():
            continue
        compared += 1
        # Other weights and random numbers: all has to come from the checkpoint.
        resumed_module, resumed_record = module(seed=7, **module_options), Record()
        other = BestCheckpoint(str(last.parent), every_n_train_steps=every)
        resumed_run = trainer(tmp_path, resumed_record, other, gradient_clip_val=1.0, **options)
        resumed_run.fit(resumed_module, datamodule=data(tmp_path), ckpt_path=str(copy))
        assert resumed_run.global_step == run.global_step
        assert resumed_record.losses
        first = min(resumed_record.losses)
        assert resumed_record.losses == {batch: loss for batch, loss in record.losses.items() if batch >= first}
        assert resumed_record.results == {batch: result for batch, result in record.results.items() if batch >= first}
        assert_equal(small.weights(resumed_module), small.weights(full))
        assert_equal(optimizer_tensors(resumed_run), optimizer_tensors(run))
        assert other.best_model_score == keep.best_model_score
        assert resumed_module.tokens_seen == full.tokens_seen
    assert compared >= 2


def optimizer_tensors(run: pl.Trainer) -> dict[str, Tensor]:
    """Return the optimizer's state, such as Adam's moments, by parameter and name."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in run.optimizers[0].state_dict()["state"].items()
        for name, value in state.items()
    }
    assert tensors
    return tensors


def metrics(run: Path) -> list[tuple[str, ...]]:
    """Return what metrics.csv says of each step, without how long it took."""
    columns = ("step", "train_loss", "train_bits_per_byte", "val_loss", "val_bits_per_byte", "val_bits_per_character")
    with (run / "metrics.csv").open() as file:
        lines = [tuple(row[name] for name in columns) for row in csv.DictReader(file)]
    return [row for row in lines if any(row[1:])]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_resumes(program: Program, tmp_path: Path, accumulate: int) -> None:
    config = changed(("trainer", "max_steps"), 12 // accumulate)
    config["trainer"] |= {"val_check_interval": 4, "accumulate_grad_batches": accumulate}
    config["checkpoint"] = {"every_n_train_steps": 3 // accumulate}
    assert config["model"]["model"]["init_args"]["dropout"] > 0
    at = runs.prepare(tmp_path, config)
    done = runs.fit(program, at, "whole")
    assert done.code == 0, done.err
    # Three strikes at drawn batches: one while a batch is read, one before a step, one in a validation.
    draw = random.Random(accumulate)
    steps = sorted(draw.sample(range(accumulate - 1, 12, accumulate), 1))
    strikes = sorted([(draw.randrange(12), "forward"), (steps[0], "step"), (draw.choice((3, 7, 11)), "score")])
    for batch, moment in strikes:
        done = runs.fit(program, at, "struck", strike=batch, moment=moment, signal=int(signal.SIGKILL))
        assert done.code == -signal.SIGKILL, (batch, moment, done)
    done = runs.fit(program, at, "struck")
    assert done.code == 0, done.err
    assert runs.losses(at, "struck") == runs.losses(at, "whole")
    assert len(runs.losses(at, "whole")) == 12
    assert runs.weights(at, "struck") == runs.weights(at, "whole")
    assert metrics(at / "struck") == metrics(at / "whole")
