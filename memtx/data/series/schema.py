"""Columns of a series and their standardization, stored with the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx.errors import CheckpointError, DataError, closest_match

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SeriesSchema:
    """Columns that a model reads and predicts, with the statistics of the training series.

    Attributes:
        columns: Names of the columns that are read.
        targets: Names of the columns that are predicted.
        steps_ahead: Steps from the newest input to the predicted values.
        mean: Mean of each column, by name.
        std: Standard deviation of each column, by name; 1 for a constant column.
    """

    columns: tuple[str, ...]
    targets: tuple[str, ...]
    steps_ahead: int
    mean: dict[str, float]
    std: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, each once: those that are read, then the other targets."""
        return tuple(dict.fromkeys((*self.columns, *self.targets)))

    def scale(self, names: tuple[str, ...], values: NDArray[Any]) -> Array:
        """Standardize values of these columns, ``(..., len(names))``, in float64."""
        mean, std = self._statistics(names)
        return (np.asarray(values, dtype=np.float64) - mean) / std

    def unscale(self, values: NDArray[Any]) -> Array:
        """Return predictions of the targets, ``(..., len(targets))``, in the units of the series."""
        mean, std = self._statistics(self.targets)
        return np.asarray(values, dtype=np.float64) * std + mean

    def unscale_std(self, values: NDArray[Any]) -> Array:
        """Return standard deviations of the targets in the units of the series."""
        return np.asarray(values, dtype=np.float64) * self._statistics(self.targets)[1]

    def _statistics(self, names: tuple[str, ...]) -> tuple[Array, Array]:
        return np.array([self.mean[name] for name in names]), np.array([self.std[name] for name in names])

    def to_json(self) -> str:
        """Return the schema as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SeriesSchema:
        """Read :meth:`to_json`'s text; raises CheckpointError if it is damaged."""
        try:
            fields = json.loads(text)
            fields = {**fields, "columns": tuple(fields["columns"]), "targets": tuple(fields["targets"])}
            schema = cls(**fields)
            if not {*schema.names} <= {*schema.mean} & {*schema.std}:
                raise KeyError("mean or std")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            message = f"The checkpoint's columns of series are damaged ({error})."
            raise CheckpointError(message, "Restore it from a copy.") from error
        return schema


def find_columns(names: tuple[str, ...], available: tuple[str, ...], path: str) -> list[int]:
    """Return the index of each named column; raises DataError for a name that the file does not have."""
    for name in names:
        if name not in available:
            examples = ", ".join(available[:8]) + (", ..." if len(available) > 8 else "")
            raise DataError(f"'{path}' has no column '{name}'.{closest_match(name, available)}", f"It has {examples}.")
    return [available.index(name) for name in names]
