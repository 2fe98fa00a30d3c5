"""Trainer options and callbacks of the user: they win over the defaults, and a run says what it left behind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from memtx.cli.lightning_cli import MemtxCLI
from tests.commands.program import Done, Program
from tests.commands.runs import write, write_books
from tests.commands.test_mistakes import refused

NOISE = ("Total FLOPs", "Total Flops", "not used", "Epoch 0/-2", "Automatic Mixed Precision", "Warning", "weights_only")


def fit(program: Program, folder: Path, options: str, *, books: bool = True) -> Done:
    if books:
        write_books(folder / "books")
    write(folder)
    return program("fit", "--config", "c.yaml", *shlex.split(options), cwd=folder)


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run" / "checkpoints").glob("*.ckpt")}


@pytest.mark.parametrize(
    ("options", "expected", "writes"),
    [
        ("--trainer.enable_checkpointing false", "enable_checkpointing is false, so there is nothing to test", False),
        ("--trainer.barebones true --trainer.num_sanity_val_steps 2", "No checkpoint was written", False),
        ("--trainer.enable_progress_bar false", "step 4/4", True),
        ("--trainer.enable_progress_bar true", "Step", True),
        ("--trainer.callbacks+=RichProgressBar", "Epoch 0", True),
        ("--trainer.callbacks+=TQDMProgressBar", "Epoch 0", True),
        ("--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename mine", "step 4/4", True),
        ("--trainer.callbacks+=memtx.checkpoint.training.BestCheckpoint", "step 4/4", True),
        ("--trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval epoch", "step 4/4", True),
        ("--trainer.callbacks+=ModelSummary --trainer.callbacks.max_depth 2", "model.embedding", True),
        ("--trainer.enable_model_summary false --trainer.precision bf16-mixed", "step 4/4", True),
        ("--trainer.logger false", "step 4/4", True),
    ],
)
def test_the_users_choice_wins(program: Program, tmp_path: Path, options: str, expected: str, writes: bool) -> None:
    result = fit(program, tmp_path, options)
    assert result.code == 0, result.err
    text = result.out + result.err
    assert expected in text
    assert not [noise for noise in NOISE if noise in text]
    assert ("last.ckpt" in checkpoints(tmp_path)) == writes
    assert ("memtx test --run_dir run" in text) == writes
    assert ("Total params" in text) == ("barebones" not in options and "summary" not in options)
    assert ("mine.ckpt" in checkpoints(tmp_path)) == ("mine" in options)
    assert (tmp_path / "run" / "metrics.csv").exists() == ("barebones" not in options and "logger" not in options)


@pytest.mark.parametrize(
    "options",
    [
        "--trainer.max_time 00:00:00:01 --trainer.max_steps 100000 --trainer.limit_val_batches 0",
        "--trainer.max_time 00:00:00:01 --trainer.max_steps 100000 --trainer.check_val_every_n_epoch 1000",
        "--trainer.max_steps 3 --trainer.val_check_interval 100",
    ],
)
def test_a_run_that_is_stopped_can_be_tested(program: Program, tmp_path: Path, options: str) -> None:
    result = fit(program, tmp_path, options)
    assert result.code == 0, result.err
    assert "last.ckpt" in checkpoints(tmp_path)
    assert "memtx test --run_dir run" in result.out
    assert program("test", "--run_dir", "run", cwd=tmp_path).code == 0


def test_the_last_line_is_true(program: Program, tmp_path: Path) -> None:
    result = fit(program, tmp_path, "--trainer.max_steps 0")
    assert result.code == 0
    assert "no step was done, so there is nothing to test" in result.err
    assert "memtx test" not in result.out
    write_books(tmp_path / "untested", ("train", "validation"))
    result = fit(program, tmp_path, "--data.root untested", books=False)
    assert result.code == 0
    assert "no test split" in result.err
    assert "memtx test --run_dir run" not in result.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0"),
        ("--trainer.val_check_interval 999 --trainer.check_val_every_n_epoch 1", "must be less than or equal"),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val_los", "Did you mean 'val_loss'?"),
        ("--checkpoint.monitor val_los", "Did you mean 'val_loss'?"),
        ("--model.scheduler lightning.pytorch.cli.ReduceLROnPlateau --model.scheduler.monitor val_los", "'val_loss'?"),
        ("--model.optimizer torch.optim.LBFGS", "LBFGS reads a batch several times"),
        ("--model.optimizer torch.optim.SparseAdam", "dense gradients"),
        ("--trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.1", "swa_epoch_start"),
        ("--trainer.callbacks+=BatchSizeFinder --trainer.callbacks.batch_arg_name size", "Field size not found"),
        ("--trainer.callbacks+=DeviceStatsMonitor --trainer.logger false", "DeviceStatsMonitor"),
        ("--trainer.overfit_batches 0.0001", "0.0001"),
        ("--trainer.callbacks+=LearningRateFinder", "LearningRateFinder"),
    ],
)
def test_an_option_that_cannot_work_is_one_line(program: Program, tmp_path: Path, options: str, expected: str) -> None:
    result = fit(program, tmp_path, options)
    lines = result.err.splitlines()
    refused(Done(result.code, result.out, lines[-1] + "\n" if lines else ""), expected)
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


class TrainerOnly(MemtxCLI):
    """Builds the objects of a run and does not train."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize(("precision", "has_gpu"), [("highest", True), ("medium", True), (None, True), (None, False)])
def test_float32_matmul_precision(tmp_path: Path, precision: str | None, has_gpu: bool) -> None:
    """Products of float32 run in TF32 on a GPU by default; nothing is set without a GPU."""
    write_books(tmp_path / "books")
    options = ["--data.root", str(tmp_path / "books"), "--run_dir", str(tmp_path / "run"), "--trainer.accelerator=cpu"]
    options += [] if precision is None else ["--float32_matmul_precision", precision]
    calls: list[Any] = []
    with (
        patch("sys.argv", ["memtx"]),
        patch.object(torch, "set_float32_matmul_precision", calls.append),
        patch.object(torch.cuda, "is_available", lambda: has_gpu),
    ):
        TrainerOnly.from_arguments(["fit", *options], "memtx", save_config_callback=None)
    assert calls == ([precision or "high"] if has_gpu else [])
