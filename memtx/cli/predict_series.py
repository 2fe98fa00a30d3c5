"""``memtx predict`` for models of series: predictions after each step as JSON lines, and a forecast."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.cli import options
from memtx.data.series.files import CSVReader, is_series_file, open_columns, read_column_names
from memtx.data.series.schema import find_columns
from memtx.data.series.store import Series, compute_statistics
from memtx.errors import DataError, MemtxError
from memtx.inference.series import SeriesPredictor

CHUNK_STEPS = 512
"""Steps of a file that are read at once; from standard input each step is answered at once."""


def _iter_chunks(source: str, names: tuple[str, ...]) -> Iterator[NDArray[Any]]:
    """Yield the named columns of a file or of standard input, ``(steps, columns)`` each."""
    if source.endswith(".npy"):
        values = open_columns(Path(source), names, files.default_cache_dir())
        yield from (values[start : start + CHUNK_STEPS] for start in range(0, len(values), CHUNK_STEPS))
        return
    with contextlib.ExitStack() as stack:
        # Not converted into the cache, as training does: it is read once, and a pipe has no end.
        stream = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
        reader = CSVReader(stream, "standard input" if source == "-" else source)
        lines = reader.iter_values(find_columns(names, reader.names, reader.path))
        while chunk := list(itertools.islice(lines, 1 if source == "-" else CHUNK_STEPS)):
            yield np.array(chunk)


def predict_series(arguments: argparse.Namespace) -> None:
    """Write a JSON line per step with the predicted values, then those of the forecast."""
    if arguments.text is not None:
        raise MemtxError("--text is for models of texts.", "Give a file of a series, or - for standard input.")
    sources = [source for source in (arguments.source, arguments.input) if source is not None]
    if len(sources) != 1:
        raise MemtxError("Expected one series.", "Give a file, or - for standard input.")
    source: str = sources[0]
    if source != "-":
        if not is_series_file(path := Path(source)):
            raise DataError(f"'{source}' is no series.", "Give a file ending in .csv, .tsv or .npy.")
        read_column_names(path)  # a wrong path fails before the model is loaded
    placement = options.get_placement(arguments)
    with options.user_modules(arguments.modules):
        predictor = SeriesPredictor.load(arguments.checkpoint)
    predictor.model.to(**placement)
    predictor.reset()
    if source != "-":
        _check_file(source, predictor.schema.columns)
    lines: list[str] = []
    series, predictions, num_steps = [], [], 0
    for chunk in _iter_chunks(source, predictor.schema.columns):
        prediction = predictor.feed(chunk)
        first = num_steps + predictor.schema.steps_ahead
        lines += _format_lines(predictor.schema.targets, first, prediction.mean, prediction.std)
        num_steps += len(chunk)
        if arguments.plot is not None:
            series.append(chunk)
            predictions.append(prediction)
        if arguments.output is None:
            _write(lines)
    if not num_steps:
        raise DataError(f"'{source}' has no steps.", "Give a series.")
    forecast = None
    if arguments.forecast is not None:
        forecast = predictor.forecast(arguments.forecast)
        lines += _format_lines(predictor.schema.targets, num_steps, forecast, None, is_forecast=True)
    if arguments.output is None:
        _write(lines)
    else:
        files.write_text(arguments.output, "".join(lines))
    if arguments.plot is not None:
        from memtx.task_plots import plot_series

        stds = [prediction.std for prediction in predictions if prediction.std is not None]
        name = predictor.schema.targets[0]
        column = predictor.schema.columns.index(name) if name in predictor.schema.columns else None
        plot_series(
            arguments.plot,
            None if column is None else np.concatenate(series)[:, column],
            np.concatenate([prediction.mean for prediction in predictions])[:, 0],
            np.concatenate(stds)[:, 0] if stds else None,
            None if forecast is None else forecast[:, 0],
            steps_ahead=predictor.schema.steps_ahead,
            title=f"{name} of {Path(source).name}",
        )


def _check_file(source: str, names: tuple[str, ...]) -> None:
    """Raise DataError for a mistake anywhere in a file, before any output is written."""
    if source.endswith(".npy"):
        values = open_columns(Path(source), names, files.default_cache_dir())
        compute_statistics([Series(Path(source), values, 0, len(values))], names)
        return
    for _ in _iter_chunks(source, names):
        pass


def _write(lines: list[str]) -> None:
    sys.stdout.write("".join(lines))
    sys.stdout.flush()
    lines.clear()


def _format_lines(
    targets: tuple[str, ...],
    first: int,
    mean: NDArray[np.float64],
    std: NDArray[np.float64] | None,
    *,
    is_forecast: bool = False,
) -> Iterator[str]:
    """Yield a line for each predicted step, counted from 0."""
    for index, values in enumerate(mean):
        line: dict[str, Any] = {"step": first + index, "mean": dict(zip(targets, values.tolist(), strict=True))}
        if std is not None:
            line["std"] = dict(zip(targets, std[index].tolist(), strict=True))
        yield json.dumps(line | ({"forecast": True} if is_forecast else {})) + "\n"
