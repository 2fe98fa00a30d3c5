"""Options, callbacks, optimizers and schedules of Lightning and torch that a user may choose."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.checkpoint.training import BestCheckpoint
from memtx.errors import MemtxError
from memtx.memory.compression import AttentionReconstruction
from memtx.memory.slots import SlotMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.language import LanguageModule
from memtx.training.muon import MuonWithAdamW, find_hidden_matrices
from memtx.training.optimizers import build_optimizer
from tests.training.small import Record, assert_equal, data, memory, module, sgd, trainer, weights


def fit(root: Path, language_module: LanguageModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_steps": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    run = trainer(root, *callbacks, **(settings | options))
    run.fit(language_module, datamodule=data(root))
    return run


# Batches


class Batches(pl.Callback):
    """Batches and losses of training, in order."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.tokens.append(batch.tokens.clone())


@pytest.mark.parametrize("unbounded", [False, True])
def test_overfitting_repeats_batches_from_the_same_state(tmp_path: Path, unbounded: bool) -> None:
    """With a learning rate of 0, every epoch has the losses of the first."""
    record, batches = Record(), Batches()
    memories = (memory(), partial(SlotMemory, num_slots=2)) if unbounded else (memory(),)
    language_module = module(dropout=0.0, optimizer=partial(sgd, lr=0.0), scheduler=None)
    if unbounded:
        language_module = LanguageModule(
            partial(type(language_module.model), dim=16, depth=1, heads=2, memories=(memories,)),
            segment_length=8, optimizer=partial(sgd, lr=0.0), scheduler=None, state_reset_prob=0.5,
        )  # fmt: skip
    fit(tmp_path, language_module, record, batches, overfit_batches=3, max_steps=9)
    losses = list(record.losses.values())
    assert losses[:3] == losses[3:6] == losses[6:]
    assert len(set(losses[:3])) == 3
    assert all(torch.equal(tokens, other) for tokens, other in zip(batches.tokens, batches.tokens[3:], strict=False))


def test_overfitting_resumes_exactly(tmp_path: Path) -> None:
    folder, complete = str(tmp_path / "checkpoints"), Record()
    expected = module(scheduler=None)
    fit(tmp_path, expected, complete, overfit_batches=3, max_steps=7)
    fit(tmp_path, module(scheduler=None), BestCheckpoint(folder), overfit_batches=3, max_steps=4)
    resumed, language_module = Record(), module(scheduler=None)
    run = trainer(tmp_path, resumed, max_steps=7, overfit_batches=3, limit_val_batches=1)
    run.fit(language_module, datamodule=data(tmp_path), ckpt_path=f"{folder}/last.ckpt")
    assert {batch: loss for batch, loss in complete.losses.items() if batch >= 4} == resumed.losses
    assert_equal(weights(language_module.model), weights(expected.model))


@pytest.mark.parametrize(("limit", "accumulate"), [(0.3, 1), (0.5, 5), (5, 2), (0.7, 3)])
def test_epochs_of_a_limit_have_the_same_length(tmp_path: Path, limit: float, accumulate: int) -> None:
    """The books have 24 batches; the schedule ends with the run, and no epoch is shorter."""
    num_batches = len(data(tmp_path).train_dataloader())
    per_epoch = limit if isinstance(limit, int) else int(num_batches * limit)
    run = fit(
        tmp_path, module(), max_steps=-1, max_epochs=2, limit_train_batches=limit, accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )  # fmt: skip
    assert run.global_step == 2 * -(-per_epoch // accumulate)
    assert run.lr_scheduler_configs[0].scheduler.total_steps == run.global_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0"),
        ({"accumulate_grad_batches": -1}, "accumulate_grad_batches is -1"),
        ({"val_check_interval": 0}, "val_check_interval is 0.*limit_val_batches 0"),
        ({"val_check_interval": 0.0, "check_val_every_n_epoch": 1}, "val_check_interval is 0.0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch is 0"),
    ],
)
def test_numbers_are_checked_before_the_first_step(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    record = Record()
    with pytest.raises(MemtxError, match=message):
        fit(tmp_path, module(), record, **options)
    assert not record.losses


# Monitored names


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (EarlyStopping("val_los"), {}, "EarlyStopping monitors 'val_los'.* Did you mean 'val_loss'?"),
        (EarlyStopping("val_accuracy"), {}, "val_accuracy', which is never logged.*Logged: .*val_bits"),
        (EarlyStopping("val_loss"), {"limit_val_batches": 0}, "no validation.*train_loss"),
        (BestCheckpoint(monitor="bits_per_byte"), {}, "BestCheckpoint.*Did you mean 'val_bits_per_byte'"),
        (EarlyStopping("val_word_perplexity"), {}, "left out where it means nothing.*Monitor val_bits_per_byte"),
        (pl.callbacks.ModelCheckpoint(monitor="loss"), {}, "ModelCheckpoint monitors 'loss'"),
    ],
)
def test_monitored_names_are_checked(
    tmp_path: Path, callback: pl.Callback, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MemtxError, match=message):
        fit(tmp_path, module(), callback, **options)


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss", "train_attention_reconstruction", "val_memory_gain"])
def test_every_logged_name_can_be_monitored(tmp_path: Path, monitor: str) -> None:
    layers = partial(
        MemoryTransformer, dim=16, depth=1, heads=2, memories=(memory(reconstruction=AttentionReconstruction),)
    )
    language_module = LanguageModule(layers, segment_length=8)
    keep = BestCheckpoint(str(tmp_path / "checkpoints"))
    run = fit(tmp_path, language_module, EarlyStopping(monitor), keep, val_check_interval=2, max_steps=6)
    assert run.global_step == 6


def test_names_of_a_users_callback_are_not_checked(tmp_path: Path) -> None:
    class Logs(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("my_score", 1.0)

    assert fit(tmp_path, module(), Logs(), EarlyStopping("my_score"), val_check_interval=2).global_step == 4


# Optimizers and schedules


def test_muon_updates_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    language_module = module(optimizer=partial(torch.optim.Muon, lr=0.02), dropout=0.0)
    before = weights(language_module)
    run = fit(tmp_path, language_module, max_steps=1, limit_val_batches=0)
    optimizer = run.optimizers[0]
    assert isinstance(optimizer, MuonWithAdamW)
    names = {parameter: name for name, parameter in language_module.named_parameters()}
    by_muon = {names[parameter] for parameter, state in optimizer.state.items() if "momentum_buffer" in state}
    by_adamw = {names[parameter] for parameter, state in optimizer.state.items() if "exp_avg" in state}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert "model.embedding.weight" in by_adamw
    assert all(names[parameter] in by_adamw for parameter in names if parameter.dim() != 2)
    assert by_muon == {names[parameter] for parameter in find_hidden_matrices(language_module)}
    assert len(by_muon) > 4
    after = weights(language_module)
    assert all(not torch.equal(before[name], after[name]) for name in by_muon | by_adamw)
    # AdamW's rate is its own, and the schedule scales both.
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert rates[0] == 0.02
    assert set(rates[1:]) == {1e-3}
    matched = module(optimizer=partial(torch.optim.Muon, lr=0.02, adjust_lr_fn="match_rms_adamw"))
    rates = [group["initial_lr"] for group in fit(tmp_path, matched, max_steps=1).optimizers[0].param_groups]
    assert set(rates) == {0.02}


def test_muon_resumes_exactly(tmp_path: Path) -> None:
    folder, muon = str(tmp_path / "checkpoints"), partial(torch.optim.Muon, lr=0.02)
    expected = module(optimizer=muon, scheduler=None)
    fit(tmp_path, expected, max_steps=6)
    fit(tmp_path, module(optimizer=muon, scheduler=None), BestCheckpoint(folder), max_steps=3)
    resumed = module(optimizer=muon, scheduler=None)
    run = trainer(tmp_path, max_steps=6, limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(resumed, datamodule=data(tmp_path), ckpt_path=f"{folder}/last.ckpt")
    assert_equal(weights(resumed.model), weights(expected.model))


def test_lbfgs_is_refused() -> None:
    with pytest.raises(MemtxError, match="LBFGS reads a batch several times"):
        build_optimizer(torch.optim.LBFGS, torch.nn.Linear(2, 2))


def test_a_schedule_that_ends_before_the_run_is_refused(tmp_path: Path) -> None:
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=3)
    with pytest.raises(MemtxError, match="OneCycleLR has 3 total_steps, the run 4"):
        fit(tmp_path, module(scheduler=schedule))
    fit(tmp_path, module(scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=4)))


@pytest.mark.parametrize(("limit", "expected"), [(1, 0.01 * 0.5**2), (0, 0.01)])
def test_a_plateau_is_one_of_validations(tmp_path: Path, limit: int, expected: float) -> None:
    """The rate falls at the second and third of 3 validations, of which none improves; or at epochs, here none."""
    schedule = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
    run = fit(
        tmp_path, module(scheduler=schedule), max_steps=9, val_check_interval=3, limit_val_batches=limit,
    )  # fmt: skip
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_accumulation_by_epoch_is_in_the_schedule(tmp_path: Path) -> None:
    run = fit(
        tmp_path, module(), GradientAccumulationScheduler({0: 1, 1: 3}), max_steps=-1, max_epochs=3,
        limit_train_batches=4, limit_val_batches=0,
    )  # fmt: skip
    assert run.global_step == 4 + 2 + 2
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 8


# Tuners


def test_a_search_leaves_nothing_behind(tmp_path: Path) -> None:
    """The run is that of the value which was found."""
    tuner = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    record, language_module = Record(), module()
    fit(tmp_path, language_module, tuner, record)
    plain, expected = Record(), module()
    run = trainer(tmp_path, plain, max_steps=4, limit_val_batches=1, num_sanity_val_steps=0)
    assert tuner.optimal_batch_size == 4
    run.fit(expected, data(tmp_path, batch_size=4))
    assert plain.losses == record.losses
    assert_equal(weights(language_module.model), weights(expected.model))
    with pytest.raises(MemtxError, match="LearningRateFinder"):
        fit(tmp_path, module(), LearningRateFinder())


# Averages of the weights


def swa() -> pl.Callback:
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)


@pytest.mark.parametrize("average", [swa, partial(EMAWeightAveraging, decay=0.5)])
def test_an_average_is_validated_and_exported(tmp_path: Path, average: Any) -> None:
    folder = tmp_path / "checkpoints"
    language_module = module()
    keep = BestCheckpoint(str(folder))
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 3, "val_check_interval": 9}
    run = fit(tmp_path, language_module, average(), keep, **options)
    # Lightning puts the average into the module at the end.
    averaged = weights(language_module.model)
    plain = module()
    fit(tmp_path, plain, **options)
    assert not torch.equal(averaged["embedding.weight"], plain.model.embedding.weight)
    for path in (folder / "last.ckpt", folder):
        assert_equal(weights(load_model_and_tokenizer(path)[0]), averaged)
    # The score in best.json is that of these weights.
    result = trainer(tmp_path, limit_val_batches=1).validate(language_module, datamodule=data(tmp_path), verbose=False)
    assert result[0]["val_bits_per_byte"] == pytest.approx(float(keep.best_model_score or 0), rel=1e-6)
    assert run.global_step == 9


@pytest.mark.parametrize("average", [swa, partial(EMAWeightAveraging, decay=0.5)])
def test_a_run_with_an_average_resumes_exactly(tmp_path: Path, average: Any) -> None:
    folder = str(tmp_path / "checkpoints")
    options: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 3, "val_check_interval": 5}
    expected = module(scheduler=None)
    fit(tmp_path, expected, average(), max_steps=-1, **options)
    fit(tmp_path, module(scheduler=None), average(), BestCheckpoint(folder), max_steps=5, **options)
    resumed = module(scheduler=None)
    run = trainer(tmp_path, average(), limit_val_batches=1, num_sanity_val_steps=0, **options)
    run.fit(resumed, datamodule=data(tmp_path), ckpt_path=f"{folder}/last.ckpt")
    assert_equal(weights(resumed.model), weights(expected.model))
