"""Plots as PNG files: the confusion of classes, and series with predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from memtx.errors import MemtxError
from memtx.plots import (
    BLUE,
    DASHED,
    MUTED_COLOR,
    ORANGE,
    TEXT_COLOR,
    PlotTarget,
    as_equal_columns,
    create_figure,
    format_count,
    save_figure,
    style_axes,
)

MAX_CONFUSION_CLASSES = 30


def plot_confusion(path: PlotTarget, labels: Sequence[str], counts: ArrayLike, *, title: str = "Confusion") -> None:
    """Draw a confusion matrix: a line for each true class, a column for each predicted one.

    Cells have their count, and a color by their share of the line. Of many classes the rarer ones become "other".

    Args:
        path: PNG file or buffer to write.
        labels: Names of the classes.
        counts: ``(classes, classes)`` counts of examples by true class and predicted class.
        title: Title of the plot.
    """
    matrix = np.asarray(counts, dtype=np.float64)
    if not len(labels) or matrix.shape != (len(labels), len(labels)) or not np.isfinite(matrix).all():
        raise MemtxError(f"A confusion matrix of {len(labels)} classes has the shape {matrix.shape}.")
    names = [label if len(label) <= 24 else f"{label[:22]}..." for label in labels]
    if len(names) > MAX_CONFUSION_CLASSES:
        order = np.argsort(-(matrix.sum(0) + matrix.sum(1)), kind="stable")
        index = np.minimum(np.argsort(order, kind="stable"), MAX_CONFUSION_CLASSES - 1)
        joined = np.zeros((MAX_CONFUSION_CLASSES, MAX_CONFUSION_CLASSES))
        np.add.at(joined, (index[:, None], index[None, :]), matrix)
        names, matrix = [names[entry] for entry in order[: MAX_CONFUSION_CLASSES - 1]] + ["other"], joined
    size = 2.6 + 0.42 * len(names)
    figure = create_figure(max(size + 0.8, 4.5), max(size, 3.6))
    axes = figure.subplots()
    style_axes(axes, title, "predicted", "true")
    axes.grid(False)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, colors=MUTED_COLOR, length=0)
    bar.set_label("share of the true class", fontsize=9, color=MUTED_COLOR)
    for (line, column), count in np.ndenumerate(matrix):
        if count:
            color = "white" if share[line, column] > 0.5 else TEXT_COLOR
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7 if count < 10_000 else 5}
            axes.text(column, line, f"{count:,.0f}" if count < 100_000 else format_count(count), color=color, **style)
    is_long = max(map(len, names)) > 4
    axes.set_xticks(range(len(names)), names, rotation=90 if is_long and len(names) > 3 else 0)
    axes.set_yticks(range(len(names)), names)
    save_figure(figure, path)


def plot_series(
    path: str | os.PathLike[str],
    values: ArrayLike | None,
    mean: ArrayLike,
    std: ArrayLike | None = None,
    forecast: ArrayLike | None = None,
    *,
    steps_ahead: int = 1,
    title: str = "Series",
    max_steps: int = 240,
) -> None:
    """Draw the newest ``max_steps`` of a series with its predictions, two standard deviations, and a forecast.

    ``values`` and ``mean`` are ``(n,)``, the series (None if it is not known) and the prediction made after each step
    for ``steps_ahead`` steps later; ``forecast`` continues the predictions.
    """
    predicted = as_equal_columns(mean=mean)[0]
    first = max(0, len(predicted) - max_steps)
    figure = create_figure(10, 3.8)
    axes = figure.subplots()
    style_axes(axes, title, "step", "")
    steps = np.arange(first, len(predicted)) + steps_ahead
    if std is not None:
        band = 2 * as_equal_columns(mean=mean, std=std)[1][first:]
        low, high = predicted[first:] - band, predicted[first:] + band
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label="two standard deviations")
    if values is not None:
        series = as_equal_columns(mean=mean, values=values)[1][first:]
        axes.plot(steps - steps_ahead, series, color=TEXT_COLOR, linewidth=1.0, label="series")
    name = f"predicted {steps_ahead} step{'s' * (steps_ahead != 1)} before"
    axes.plot(steps, predicted[first:], color=BLUE, linewidth=1.3, label=name)
    if forecast is not None:
        future = as_equal_columns(forecast=forecast)[0]
        axes.plot(len(predicted) + np.arange(len(future)), future, color=ORANGE, linewidth=1.6, label="forecast")
        axes.axvline(len(predicted) - 0.5, color=MUTED_COLOR, linewidth=0.9, linestyle=DASHED)
    legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOR, **legend)
    save_figure(figure, path)
