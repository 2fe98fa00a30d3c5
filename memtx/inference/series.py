"""Predictions of a series with a trained model, chunk by chunk or step by step, in the units of the series."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.checkpoint import pretrained
from memtx.checkpoint.load import load
from memtx.data.series.schema import Array, SeriesSchema
from memtx.errors import CheckpointError, DataError, MemtxError, check_at_least
from memtx.models.sequence_model import SequenceModel
from memtx.state import MemoryState


@dataclass(frozen=True)
class SeriesPrediction:
    """Predictions after each step that was read.

    Attributes:
        mean: ``(steps, targets)`` float64, expected values ``steps_ahead`` steps later.
        std: ``(steps, targets)`` float64, their standard deviations; None if the head predicts none.
    """

    mean: Array
    std: Array | None


class SeriesPredictor:
    """Reads one series of any length, given in chunks of any size, with a state of fixed size.

    Args:
        model: Trained model; put into eval mode.
        schema: Columns and statistics that it was trained with.
        segment_length: Steps per call of the model; no effect on the results.

    Attributes:
        state: State after the steps that were read; a value, to be kept, set again, or saved by its ``save``.
    """

    def __init__(self, model: SequenceModel, schema: SeriesSchema, segment_length: int = 512) -> None:
        check_at_least(1, segment_length=segment_length)
        self.model, self.schema, self.segment_length = model.eval(), schema, segment_length
        self.state: MemoryState = model.init_state(1)
        self._newest_mean: Array | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a checkpoint, a run or a model folder; raises CheckpointError if it holds no model of series."""
        checkpoint = load(path)
        model = checkpoint.model_as(SequenceModel)
        text = checkpoint.sidecars.get("series")
        if text is None:
            message = f"'{path}' does not tell its columns."
            raise CheckpointError(message, "Give a checkpoint of a run on series.")
        return cls(model, SeriesSchema.from_json(text))

    def reset(self) -> None:
        """Begin a new series."""
        self.state, self._newest_mean = self.model.init_state(1), None

    def feed(self, values: NDArray[Any]) -> SeriesPrediction:
        """Read the next steps ``(steps, columns)`` and return the predictions after each.

        Raises DataError if the shape does not fit, or a value is not finite; the state is unchanged then.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.schema.columns):
            message = f"values is {values.shape}, expected (steps, {len(self.schema.columns)})."
            raise DataError(message, f"Give the columns {', '.join(self.schema.columns)}.")
        if not np.isfinite(values).all():
            step, column = map(int, np.argwhere(~np.isfinite(values))[0])
            message = f"values has {values[step, column]} in step {step}, column '{self.schema.columns[column]}'."
            raise DataError(message, "Fill the gap, or begin a new series after it.")
        means, stds = [np.empty((0, len(self.schema.targets)))], []
        for start in range(0, len(values), self.segment_length):
            mean, std = self._read(self.schema.scale(self.schema.columns, values[start : start + self.segment_length]))
            means.append(mean)
            stds.append(std)
        scaled = np.concatenate(means)
        if len(values):
            self._newest_mean = scaled[-1]
        has_std = any(std is not None for std in stds)
        std = np.concatenate([std for std in stds if std is not None]) if has_std else None
        return SeriesPrediction(self.schema.unscale(scaled), None if std is None else self.schema.unscale_std(std))

    def forecast(self, steps: int) -> Array:
        """Return the expected values of the next steps, ``(steps, targets)``; the state is unchanged.

        Each prediction is read as the next input.

        Raises:
            MemtxError: The model does not predict the next step of all columns it reads, or has read nothing yet.
        """
        check_at_least(1, steps=steps)
        schema = self.schema
        if schema.steps_ahead != 1 or set(schema.columns) != set(schema.targets):
            message = f"The model predicts {', '.join(schema.targets)} {schema.steps_ahead} steps ahead and reads "
            message += f"{', '.join(schema.columns)}."
            raise MemtxError(message, "A forecast needs the next step of all columns: train with that.")
        if self._newest_mean is None:
            raise MemtxError("No step was read yet.", "Feed the series first.")
        state, newest = self.state, self._newest_mean
        order = [schema.targets.index(name) for name in schema.columns]
        forecast = [newest]
        for _ in range(steps - 1):
            mean, _ = self._read(forecast[-1][None, order])
            forecast.append(mean[0])
        self.state = state
        return schema.unscale(np.stack(forecast))

    @torch.inference_mode()
    def _read(self, scaled: Array) -> tuple[Array, Array | None]:
        """Return mean and standard deviation in standardized units after each step."""
        weight = next(self.model.parameters())
        inputs = torch.from_numpy(scaled).to(weight.device, weight.dtype)[None]
        output = self.model(inputs, self.state.to(weight.device))
        self.state = output.state
        mean, std = self.model.mean(output.logits), self.model.std(output.logits)
        return mean[0].double().cpu().numpy(), None if std is None else std[0].double().cpu().numpy()


def is_series_model(path: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint, run or model folder holds a model of series."""
    return "series" in pretrained.read_sidecars(pretrained.resolve_model_path(path))
