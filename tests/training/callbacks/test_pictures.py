"""Pictures of validations in each kind of logger, and the options of a run in trackers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memtx.data.batch import Batch
from memtx.training import trackers
from memtx.training.callbacks.defaults import adapt_options
from memtx.training.callbacks.memory_monitor import MemoryNormMonitor
from memtx.training.callbacks.pictures import ValidationPictures
from memtx.training.csv_logger import ResumableCSVLogger
from memtx.training.finetuning import count_pairs
from memtx.training.metrics import MIN_POSITION, position_of_bins, sum_by_position
from tests.tasks import folder
from tests.training.small import data, model, module, trainer
from tests.training.test_finetuning import parts
from tests.training.test_finetuning import trainer as task_trainer


class RecordingLogger(Logger):
    """A logger of a package that is not installed, whose calls it writes down."""

    run_id, name, version = "run", "name", "version"

    def __init__(self) -> None:
        self.pictures: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.options: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self.log_image)

    def log_image(self, *values: Any, **options: Any) -> None:
        self.pictures[options.get("artifact_file") or options["name"]] = values[-1]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, params: Any) -> None:
        self.options = params


class MLFlowLogger(RecordingLogger):
    pass


class CometLogger(RecordingLogger):
    pass


class FailingCometLogger(CometLogger):
    def log_image(self, *values: Any, **options: Any) -> None:
        raise ConnectionError("no server")

    def log_hyperparams(self, params: Any) -> None:
        raise ConnectionError("no server")


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(content, "png")
    return content.getvalue()


def images(path: Path) -> dict[str, list[int]]:
    """Return the steps of TensorBoard's pictures by name."""
    events = EventAccumulator(str(path), {"images": 0})
    events.Reload()
    return {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}


def test_each_kind_of_logger_gets_the_picture(tmp_path: Path) -> None:
    loggers: list[Any] = [MLFlowLogger(), CometLogger(), TensorBoardLogger(str(tmp_path), name="", version="")]
    for logger in loggers:
        assert trackers.takes_pictures(logger)
        assert trackers.log_picture(logger, "a", png(), 7)
        logger.save()
    assert list(loggers[0].pictures) == ["pictures/a/step-00000007.png"]
    assert loggers[1].pictures["a"].size == (4, 2)
    assert images(tmp_path) == {"a": [7]}
    assert not trackers.log_picture(CSVLogger(str(tmp_path)), "a", png(), 7)


def test_language_models_draw_loss_gain_and_state(tmp_path: Path) -> None:
    logger, texts = CometLogger(), data(tmp_path)
    callbacks = (MemoryNormMonitor(every_n_batches=1), ValidationPictures(every_n_steps=2))
    run = trainer(tmp_path, *callbacks, max_steps=3, val_check_interval=1, num_sanity_val_steps=1, logger=logger)
    language_module = module()
    run.fit(language_module, texts)
    assert set(logger.pictures) == {"bits_per_byte_by_position", "memory_gain_by_distance", "memory_rms"}
    assert callbacks[1]._last_step == 2, "validations after steps 1, 2 and 3; sanity checks do not count"
    assert language_module.picture_sums is None


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_tasks_draw_the_confusion_of_labels(kind: str, tmp_path: Path) -> None:
    logger = CometLogger()
    task_module, texts = parts(kind, folder(tmp_path, kind, 8))
    run = task_trainer(max_epochs=1, logger=logger, callbacks=[ValidationPictures(1)])
    run.fit(task_module, texts)
    assert set(logger.pictures) == {"confusion"}


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = FailingCometLogger()
    run = trainer(tmp_path, ValidationPictures(1), max_steps=2, val_check_interval=1, logger=logger)
    run.fit(module(), data(tmp_path))
    err = capsys.readouterr().err
    assert err.count("FailingCometLogger did not take the picture") == 1
    assert err.count("no server") == 1
    assert list(trackers.log_options([logger, MLFlowLogger()], {"a": 1})) == ["FailingCometLogger"]


def test_sums_by_position_are_those_of_the_documents() -> None:
    length, nll = 40, torch.arange(80.0).view(2, 40)
    begins = torch.zeros(2, length, dtype=torch.bool)
    begins[:, 0] = begins[1, 30] = True
    tokens = torch.zeros(2, length, dtype=torch.long)
    num_bytes = torch.tensor([80, 40])
    batch = Batch(tokens, tokens, begins, num_bytes, num_bytes)
    sums = sum_by_position(batch, nll, model().init_state(2))
    assert sums[0].sum() == nll.sum()
    assert sums[1].sum() == 120
    # Positions 0 to 15 of the first document, of the second and of the third, which begins at 30.
    early = torch.cat([nll[0, :MIN_POSITION], nll[1, :MIN_POSITION], nll[1, 30:40]])
    assert sums[0, 0] == early.sum()
    assert sums[1, 0] == 16 * 2 + 16 + 10
    positions = position_of_bins(len(sums[0]))
    assert (positions.diff() > 0).all()
    assert positions[1] == pytest.approx(MIN_POSITION * 2**0.25)


def test_pairs_are_counted() -> None:
    counts = count_pairs(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 2]), 3)
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_pictures_are_drawn_for_chosen_trackers_and_seldom_by_default(tmp_path: Path) -> None:
    def pictures(loggers: Any) -> list[int]:
        callbacks = adapt_options({"logger": loggers, "callbacks": None}, [], False)["callbacks"]
        return [callback.every_n_steps for callback in callbacks if isinstance(callback, ValidationPictures)]

    tensorboard = TensorBoardLogger(str(tmp_path))
    assert pictures([ResumableCSVLogger(tmp_path), tensorboard]) == [100]
    assert pictures(tensorboard) == pictures([CometLogger(), CSVLogger(str(tmp_path))]) == [1]
    assert pictures(CSVLogger(str(tmp_path))) == pictures(False) == pictures(None) == []


def test_trackers_get_the_options_and_the_run_folder_does_not(tmp_path: Path) -> None:
    logger = CometLogger()
    assert not trackers.log_options([logger], {"data": {"root": "books"}})
    assert logger.options == {"data": {"root": "books"}}
    other = CometLogger()
    trackers.log_options([other, ResumableCSVLogger(tmp_path)], {"a": 1})
    assert not other.options


def test_mlflow_keeps_a_metric_beside_its_group() -> None:
    metrics = {"val_gain/window": 1.0, "val_gain": 2.0, "lr-AdamW/pg1": 3.0}
    mlflow, comet = MLFlowLogger(), CometLogger()
    for logger in (mlflow, comet):
        trackers.separate_names(logger)
        logger.log_metrics(metrics, step=1)
        logger.log_metrics({"val_gain/bank": 4.0})
    assert set(mlflow.metrics) == {"val_gain", "val_gain.window", "val_gain.bank", "lr-AdamW/pg1"}
    assert set(comet.metrics) == {*metrics, "val_gain/bank"}


def test_position_curves_are_bits_per_byte(tmp_path: Path) -> None:
    from memtx.training.callbacks.pictures import _position_curve

    sums = torch.zeros(2, 8, dtype=torch.float64)
    assert _position_curve(sums) is None
    sums[:, 2] = torch.tensor([math.log(2) * 6, 3.0])
    positions, bits = _position_curve(sums) or ([], [])
    assert np.allclose(bits, [2.0])
    assert positions == [position_of_bins(8)[2].item()]


@pytest.mark.slow
def test_real_trackers_take_pictures_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = [WandbLogger(offline=True, save_dir=str(tmp_path)), MLFlowLogger(save_dir=str(tmp_path / "mlruns"))]
    for logger in loggers:
        trackers.separate_names(logger)
    texts = data(tmp_path)
    run = trainer(tmp_path, ValidationPictures(1), max_steps=2, val_check_interval=1, logger=loggers)
    run.fit(module(), texts)
    assert not trackers.log_options(loggers, {"data": {"root": "books"}})
    wandb.finish()
    for name in ("bits_per_byte_by_position", "memory_gain_by_distance"):
        assert list(tmp_path.glob(f"wandb/offline-run-*/files/media/images/{name}_*.png"))
        assert len(list(tmp_path.glob(f"mlruns/*/*/artifacts/pictures/{name}/step-*.png"))) == 2
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    recorded = client.get_run(loggers[1].run_id).data
    assert recorded.params["data/root"] == "books"
    assert {"val_memory_gain", "val_memory_gain.window"} <= set(recorded.metrics)
