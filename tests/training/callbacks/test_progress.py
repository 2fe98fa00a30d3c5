"""Progress of a run, with and without a terminal."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich

from memtx.checkpoint import trainer_state
from memtx.checkpoint.training import BestCheckpoint
from memtx.training.callbacks.progress import PlainProgress, StepProgressBar, format_duration
from memtx.word_measure import MAX_WORD_PERPLEXITY
from tests.training.small import data, module, trainer


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (3540, "59 min"), (3600, "1 h 00 min"), (100_000, "27 h 47 min")],
)
def test_durations_are_formatted(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


class Clock:
    """Ten seconds a look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


def lines(tmp_path: Path, seconds: float, **options: Any) -> list[str]:
    written: list[str] = []
    plain = PlainProgress(seconds, write=written.append, clock=Clock())
    settings: dict[str, Any] = {"max_steps": 12, "limit_val_batches": 0}
    trainer(tmp_path, plain, **(settings | options)).fit(module(), datamodule=data(tmp_path))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in written)
    return [line.rstrip("\n") for line in written]


def test_a_line_per_interval(tmp_path: Path) -> None:
    written = lines(tmp_path, 30)
    assert [line.split("  ")[0] for line in written] == ["step 3/12", "step 6/12", "step 9/12", "step 12/12"]
    # 32 tokens in each of three batches, thirty seconds; nine steps to go at ten seconds.
    assert re.fullmatch(r"step 3/12  loss \d\.\d{3}  bits/byte \d\.\d{3}  3 tokens/s  2 min left", written[0])
    assert written[-1].endswith("0 s left")


@pytest.mark.parametrize(("limit", "perplexity"), [(MAX_WORD_PERPLEXITY, ""), (math.inf, r"  word perplexity \d\S*")])
def test_a_line_per_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, perplexity: str) -> None:
    """Without a word perplexity that means nothing, as that of an untrained model."""
    monkeypatch.setattr("memtx.metrics.MAX_WORD_PERPLEXITY", limit)
    written = lines(tmp_path, 1e9, limit_val_batches=1.0, val_check_interval=5)
    assert len(written) == 2
    pattern = r"step {}/12  validation  loss \d\.\d{{3}}  bits/byte \d\.\d{{4}}  bits/character \d\.\d{{4}}"
    pattern += perplexity + r"  memory gain -?\d\.\d{{4}}"
    assert re.fullmatch(pattern.format(5), written[0])
    assert re.fullmatch(pattern.format(10), written[1])


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    written = lines(tmp_path, 10, max_steps=3, accumulate_grad_batches=2)
    assert [line.split("  ")[0] for line in written] == ["step 1/3", "step 2/3", "step 3/3"]


def test_resumed_steps_do_not_count_for_the_estimate(tmp_path: Path) -> None:
    keep = BestCheckpoint(str(tmp_path / "checkpoints"))
    trainer(tmp_path, keep, max_steps=10, limit_val_batches=0).fit(module(), datamodule=data(tmp_path))
    written: list[str] = []
    plain = PlainProgress(10, write=written.append, clock=Clock())
    run = trainer(tmp_path, plain, max_steps=16, limit_val_batches=0)
    run.fit(module(), datamodule=data(tmp_path), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert written[0].startswith("step 11/16")
    assert written[0].endswith("50 s left\n")


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_steps": 3}, 3),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "limit_train_batches": 5, "max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 5, "max_steps": 70}, 10),
    ],
)
def test_total_steps_and_last_step(tmp_path: Path, options: dict[str, Any], total: int) -> None:
    class Last(pl.Callback):
        decisions: list[bool] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            self.decisions.append(trainer_state.is_last_step(trainer))
            assert trainer_state.total_steps(trainer) == total

    last = Last()
    last.decisions = []
    run = trainer(tmp_path, last, limit_val_batches=0, **options)
    run.fit(module(), datamodule=data(tmp_path))
    assert run.global_step == total
    assert last.decisions[-1]
    assert not any(last.decisions[:-1])


def test_the_bar_counts_optimizer_steps(tmp_path: Path) -> None:
    """One bar over all epochs, which goes on where a run does."""
    screen = io.StringIO()
    options = {"limit_train_batches": 5, "limit_val_batches": 1, "val_check_interval": 4, "enable_progress_bar": True}
    keep = BestCheckpoint(str(tmp_path / "checkpoints"))
    for steps, path in ((7, None), (12, str(tmp_path / "checkpoints" / "last.ckpt"))):
        bar = StepProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 200})
        run = trainer(tmp_path, bar, keep, max_steps=steps, **options)
        try:
            run.fit(module(), datamodule=data(tmp_path), ckpt_path=path)
            assert bar.progress is not None
            assert bar.train_progress_bar_id is not None
            task = bar.train_progress_bar
            assert (task.completed, task.total) == (steps, steps)
            assert task.description.strip() == "Step"
            metrics = bar.get_metrics(run, run.lightning_module)
            assert metrics.keys() == {"loss", "bits/byte", "val bits/byte"}
        finally:
            rich.reconfigure()
    text = screen.getvalue()
    assert "7/7" in text
    assert "12/12" in text
    assert "Epoch" not in text


def test_an_endless_bar(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    screen = io.StringIO()
    bar = StepProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 200})
    try:
        run = trainer(tmp_path, bar, Stop(), limit_val_batches=0, enable_progress_bar=True)
        run.fit(module(), datamodule=data(tmp_path))
        assert trainer_state.total_steps(run) is None
        assert math.isinf(float(bar.train_progress_bar.total or 0))
    finally:
        rich.reconfigure()
    assert "3/--" in screen.getvalue()
