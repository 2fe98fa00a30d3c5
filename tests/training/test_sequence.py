"""Training on series: the state is carried, runs resume exactly, and predictions are those of the trained model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from memtx import (
    GaussianMixtureHead,
    MemoryTransformer,
    SequenceModel,
    SequenceModule,
    SeriesDataModule,
    SeriesPredictor,
)
from memtx.checkpoint.convert import convert
from memtx.errors import CheckpointError, DataError, MemtxError
from tests.training.small import SEGMENT, adam, memory, trainer

BACKBONE = partial(MemoryTransformer, dim=16, depth=2, heads=2, memories=(memory(),))
MODEL = partial(SequenceModel, backbone=BACKBONE, head=partial(GaussianMixtureHead, num_components=2))


def module(**options: Any) -> SequenceModule:
    pl.seed_everything(0, verbose=False)
    return SequenceModule(MODEL, 2, 2, SEGMENT, **({"optimizer": adam, "scheduler": None} | options))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("series") / "s.npy"
    values = np.random.default_rng(0).standard_normal((400, 2)).cumsum(0) * [1, 100] + [0, 1e4]
    np.save(path, values)
    return path


def data(path: Path, **options: Any) -> SeriesDataModule:
    settings = {"batch_size": 2, "segment_length": SEGMENT, "bptt_segments": 2, "cache_dir": str(path.parent / "cache")}
    return SeriesDataModule(str(path), **(settings | options))


class Losses(pl.Callback):
    """Records the losses of training."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(root: Path, path: Path, steps: int, ckpt_path: Path | None = None) -> tuple[list[float], pl.Trainer]:
    record = Losses()
    run = trainer(root, record, max_steps=steps, num_sanity_val_steps=0)
    run.fit(module(), datamodule=data(path), ckpt_path=ckpt_path)
    return record.losses, run


def test_resumed_training_has_the_same_losses(series: Path, tmp_path: Path) -> None:
    expected, _ = fit(tmp_path, series, 7)
    first, interrupted = fit(tmp_path, series, 4)
    interrupted.save_checkpoint(tmp_path / "4.ckpt")
    rest, _ = fit(tmp_path, series, 7, tmp_path / "4.ckpt")
    assert first + rest == expected


def test_a_checkpoint_tests_and_predicts_in_the_units_of_the_series(series: Path, tmp_path: Path) -> None:
    _, run = fit(tmp_path, series, 5)
    run.save_checkpoint(tmp_path / "run.ckpt")
    evaluation = data(series, eval_batch_size=1)
    tester = trainer(tmp_path)
    names = tester.validate(module(), datamodule=data(series), verbose=False)[0].keys()
    assert names == {"val_loss", "val_mse", "val_mae", "val_memory_gain"}
    result = tester.test(module(), datamodule=evaluation, ckpt_path=str(tmp_path / "run.ckpt"), verbose=False)[0]
    predictor = SeriesPredictor.load(tmp_path / "run.ckpt")
    test_part = np.load(series)[360:]
    prediction = predictor.feed(test_part)
    assert prediction.std is not None
    error = (prediction.mean[:-1] - test_part[1:]) / [predictor.schema.std["0"], predictor.schema.std["1"]]
    assert result["test_mse"] == pytest.approx((error**2).mean(), rel=1e-4)  # float32 models in calls of other lengths
    # A folder has the columns, too, and steps may come one by one.
    convert(tmp_path / "run.ckpt", tmp_path / "folder")
    stream = SeriesPredictor.load(tmp_path / "folder")
    means = np.concatenate([stream.feed(test_part[index : index + 1]).mean for index in range(len(test_part))])
    scale = predictor.schema.unscale_std(np.ones(2))
    assert np.allclose(means / scale, prediction.mean / scale, rtol=0, atol=1e-4)  # float32 in other segments
    # A forecast reads its own predictions and changes nothing.
    forecast = predictor.forecast(3)
    assert np.array_equal(forecast[0], prediction.mean[-1])
    assert np.array_equal(forecast, predictor.forecast(3))
    assert np.allclose(stream.feed(forecast[:1]).mean / scale, forecast[1:2] / scale, rtol=0, atol=1e-4)  # the same


def test_predictor_refuses_what_does_not_fit(series: Path, tmp_path: Path) -> None:
    _, run = fit(tmp_path, series, 1)
    run.save_checkpoint(tmp_path / "run.ckpt")
    predictor = SeriesPredictor.load(tmp_path / "run.ckpt")
    with pytest.raises(MemtxError, match="No step was read"):
        predictor.forecast(2)
    before = predictor.state
    with pytest.raises(DataError, match="values has nan in step 1, column '0'"):
        predictor.feed(np.array([[0.0, 1.0], [np.nan, 1.0]]))
    with pytest.raises(DataError, match=r"values is \(3,\), expected \(steps, 2\)"):
        predictor.feed(np.zeros(3))
    assert predictor.state is before
    assert predictor.feed(np.zeros((0, 2))).mean.shape == (0, 2)
    MODEL(2, 2).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="does not tell its columns"):
        SeriesPredictor.load(tmp_path / "plain")
    with pytest.raises(MemtxError, match="distillation does not support"):
        module(distillation=object())


def test_memory_is_carried_across_batches_and_reset_at_episode_ends(series: Path) -> None:
    training, batches = module(), data(series).train_dataloader()
    training.eval()
    state = training.model.init_state(2)
    for step in range(8):
        batch = batches.get_batch(step)
        state = training.model(batch.inputs, state, document_starts=batch.document_starts).state
    lengths = batches.store.lengths
    assert state.position.tolist() == [8 * 2 * SEGMENT % lengths[0]] * 2
    assert torch.isfinite(state.layers[0][0].hidden).all()
