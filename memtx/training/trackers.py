"""Trackers of experiments: the loggers of Lightning, and the pictures and options that each can take.

Loggers are recognized by the name of their class, so that none of their packages is imported here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger

from memtx.training.csv_logger import ResumableCSVLogger


def _log_to_tensorboard(logger: Any, name: str, image: Any, step: int) -> None:
    logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")


def _log_to_wandb(logger: Any, name: str, image: Any, step: int) -> None:
    # Lightning's own axis; W&B's step counts the calls, and log_image would set it back.
    wandb_image = __import__("wandb").Image(image)
    logger.experiment.log({name: wandb_image, "trainer/global_step": step})


def _log_to_mlflow(logger: Any, name: str, image: Any, step: int) -> None:
    logger.experiment.log_image(logger.run_id, image, artifact_file=f"pictures/{name}/step-{step:08d}.png")


def _log_to_comet(logger: Any, name: str, image: Any, step: int) -> None:
    logger.experiment.log_image(image, name=name, step=step)


_PICTURE_WRITERS: dict[str, Callable[[Any, str, Any, int], None]] = {
    "TensorBoardLogger": _log_to_tensorboard,
    "WandbLogger": _log_to_wandb,
    "MLFlowLogger": _log_to_mlflow,
    "CometLogger": _log_to_comet,
}


def _find_writer(logger: object) -> Callable[[Any, str, Any, int], None] | None:
    names = [base.__name__ for base in type(logger).__mro__]
    return next((_PICTURE_WRITERS[name] for name in names if name in _PICTURE_WRITERS), None)


def takes_pictures(logger: object) -> bool:
    """Return whether a logger can store pictures: those of TensorBoard, W&B, MLflow and Comet, and their subclasses."""
    return _find_writer(logger) is not None


def log_picture(logger: Logger, name: str, png: bytes, step: int) -> bool:
    """Log a picture to a logger of any kind; return False if the logger takes none."""
    if (write := _find_writer(logger)) is None:
        return False
    from PIL import Image

    write(logger, name, Image.open(io.BytesIO(png)).convert("RGB"), step)
    return True


def is_default(loggers: Iterable[object]) -> bool:
    """Return whether the loggers are those of the run folder, whose config.yaml holds all options."""
    return any(isinstance(logger, ResumableCSVLogger) for logger in loggers)


def log_options(loggers: Iterable[Logger], options: Mapping[str, Any]) -> dict[str, Exception]:
    """Log the options of a run to the trackers that the user chose; return the error of each that did not take them."""
    loggers, errors = list(loggers), dict[str, Exception]()
    for logger in () if is_default(loggers) else loggers:
        try:
            logger.log_hyperparams(dict(options))
        except Exception as error:  # of any package: a tracker must not end the run, which has its config.yaml
            errors[type(logger).__name__] = error
    return errors


def separate_names(logger: Any) -> None:
    """Let MLflow log a metric ``a/b`` beside a metric ``a`` as ``a.b``: its file store keeps both under one path."""
    if "MLFlowLogger" not in [base.__name__ for base in type(logger).__mro__]:
        return
    log_metrics, names = logger.log_metrics, set[str]()

    def log_separate(metrics: Mapping[str, float], step: int | None = None) -> None:
        names.update(metrics)
        log_metrics({_separate(name, names): value for name, value in metrics.items()}, step)

    logger.log_metrics = log_separate


def _separate(name: str, names: Iterable[str]) -> str:
    group, separator, last = name.rpartition("/")
    return f"{group}.{last}" if separator and group in names else name
