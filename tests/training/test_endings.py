"""The last whole step of a run is in last.ckpt, whatever ended the run, and resuming from it is exact."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from memtx.checkpoint.training import BestCheckpoint
from memtx.training.language import LanguageModule
from tests.training.small import Record, assert_equal, data, module, trainer, weights

BATCHES = 9


class EndError(RuntimeError):
    pass


class End(pl.Callback):
    """Ends the run in a hook, when a number of batches was read: by ``should_stop`` or an exception."""

    def __init__(self, hook: str, batches: int, error: type[BaseException] | None) -> None:
        self.hook, self.batches, self.error, self.has_ended = hook, batches, error, False
        setattr(self, hook, self._end)

    def _end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.sanity_checking or trainer.fit_loop.epoch_loop.total_batch_idx + 1 < self.batches or self.has_ended:
            return
        self.has_ended = True
        if self.error is not None:
            raise self.error
        trainer.should_stop = True


def run(
    root: Path, *callbacks: pl.Callback, resume: bool = False, validates: bool = True, accumulate: int = 1
) -> LanguageModule:
    language_module = module(measure_memory_gain=False)
    folder = root / "checkpoints"
    run = trainer(
        root, *callbacks, BestCheckpoint(str(folder)), max_steps=BATCHES // accumulate, limit_train_batches=6,
        limit_val_batches=2 * validates, val_check_interval=6, accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
    )  # fmt: skip
    run.fit(language_module, datamodule=data(root), ckpt_path=str(folder / "last.ckpt") if resume else None)
    return language_module


@pytest.fixture(scope="module")
def complete_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], tuple[Record, dict[str, Any]]]:
    """Return record and weights of runs that nothing ended, by ``validates`` and ``accumulate``."""
    runs = {}
    for validates, accumulate in ((True, 1), (True, 2), (False, 1), (False, 2)):
        record, root = Record(), tmp_path_factory.mktemp("complete")
        runs[validates, accumulate] = record, weights(run(root, record, validates=validates, accumulate=accumulate))
    return runs


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("on_train_batch_end", None),
        ("on_train_batch_start", None),
        ("on_validation_end", None),
        ("on_train_epoch_end", None),
        ("on_train_batch_start", EndError),
        ("on_after_backward", EndError),
        ("on_train_batch_end", EndError),
        ("on_validation_batch_start", EndError),
        ("on_train_epoch_start", EndError),
        ("on_before_backward", KeyboardInterrupt),
    ],
)
def test_the_last_whole_step_is_saved(
    tmp_path: Path, hook: str, error: type[BaseException] | None, validates: bool, accumulate: int, complete_runs: Any
) -> None:
    if "validation" in hook and not validates:
        pytest.skip("this hook needs a validation")
    options: dict[str, Any] = {"validates": validates, "accumulate": accumulate}
    record, end = Record(), End(hook, 4, error)
    with contextlib.suppress(EndError, SystemExit):
        run(tmp_path, record, end, **options)
    assert end.has_ended
    # The last batch with a whole step: its callbacks have run, or another one's raised.
    num_steps = (max(record.losses) + 1) // accumulate
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == num_steps
    resumed = Record()
    trained = run(tmp_path, resumed, resume=True, **options)
    complete, expected = complete_runs[validates, accumulate]
    # The batches of a step that was not finished are read again, and a validation that was not is repeated.
    losses = {batch: loss for batch, loss in complete.losses.items() if batch >= num_steps * accumulate}
    assert resumed.losses == losses
    # A run that should stop validates before it does.
    assert complete.results.items() <= (record.results | resumed.results).items()
    assert_equal(weights(trained), expected)
