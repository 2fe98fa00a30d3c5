"""Plots as PNG files: surprisal, losses, accuracy by distance, comparisons of models and seeds.

Every function writes its file atomically, and raises MemtxError for empty columns, columns of unequal length, or a file
that cannot be written. Figures are created without pyplot, whose global state is not thread-safe.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from memtx import files
from memtx.errors import MemtxError

TEXT_COLOR = "#1f2933"
MUTED_COLOR = "#7b8794"
GRID_COLOR = "#e4e7eb"
BLUE = "#2b6cb0"
ORANGE = "#c05621"
PALETTE = (BLUE, ORANGE, "#2f855a", "#805ad5", "#b7791f", "#c53030")
DASHED = (0, (4, 3))
OFFSET_LABEL: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
DPI = 150

FloatArray = NDArray[np.float64]
PlotTarget = str | os.PathLike[str] | io.BytesIO
"""A file to write atomically, or a buffer."""


def create_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure of a width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=TEXT_COLOR)
    return figure


def style_axes(axes: Any, title: str, x_label: str, y_label: str, note: str = "") -> None:
    """Set the title, labels and look of axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT_COLOR)
    axes.set_title(note, loc="right", fontsize=8, color=MUTED_COLOR)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED_COLOR)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED_COLOR)
    axes.tick_params(labelsize=8, colors=MUTED_COLOR, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
    axes.grid(True, color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)


def format_count(value: float, _: object = None) -> str:
    """Return a count with its unit, such as 12k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def save_figure(figure: Figure, path: PlotTarget) -> None:
    """Write a figure as PNG, a file atomically; raises MemtxError if it cannot be written."""
    content = path if isinstance(path, io.BytesIO) else io.BytesIO()
    figure.savefig(content, format="png")
    if isinstance(path, io.BytesIO):
        return
    with files.atomic_open(path) as handle:
        handle.write(content.getvalue())


def as_equal_columns(**columns: ArrayLike) -> list[FloatArray]:
    """Return columns as float64; raises MemtxError unless they have one length, at least 1."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns.values()]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(columns, arrays, strict=True))
        raise MemtxError(f"A plot needs non-empty columns of equal length, got {shapes}.")
    return arrays


def moving_average(values: ArrayLike, radius: int) -> FloatArray:
    """Return the mean of ``values``, ``(n,)``, over ``radius`` neighbors on each side, fewer at the ends."""
    array = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], array.cumsum()])
    index = np.arange(len(array))
    first, end = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(array))
    averages: FloatArray = (sums[end] - sums[first]) / (end - first)
    return averages


def _draw_surprisal_curve(axes: Any, curve: tuple[ArrayLike, ArrayLike]) -> None:
    position, mean = as_equal_columns(position=curve[0], mean=curve[1])
    radius = max(1, len(mean) // 60)
    smooth = moving_average(mean, radius)
    # The spread of the chunks' means; the spread of single tokens would hide the line.
    spread = np.sqrt(np.maximum(moving_average(mean**2, radius) - smooth**2, 0))
    axes.fill_between(position, smooth - spread, smooth + spread, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(position, smooth, color=BLUE, linewidth=1.8, solid_capstyle="round")
    average = float(np.average(mean))
    axes.axhline(average, color=MUTED_COLOR, linewidth=0.9, linestyle=DASHED)
    text, coordinates = f"mean\n{average:.2f}", ("axes fraction", "data")
    axes.annotate(text, (1.0, average), (5, 0), coordinates, ha="left", color=MUTED_COLOR, **OFFSET_LABEL)
    low, high = np.percentile(smooth - spread, 1), np.percentile(smooth + spread, 99)
    margin = 0.12 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.set_xlim(0, position[-1] + position[0])
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))


def _draw_loss_by_position(axes: Any, by_position: tuple[ArrayLike, ArrayLike, ArrayLike]) -> None:
    position, mean, error = as_equal_columns(position=by_position[0], mean=by_position[1], error=by_position[2])
    bars = np.where(np.isfinite(error), error, 0.0)
    style: dict[str, Any] = {"ecolor": "#f0c8ad", "elinewidth": 2, "linewidth": 1.5, "marker": "o", "markersize": 3.5}
    axes.errorbar(position, mean, bars, color=ORANGE, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    # The loss of the first tokens is far above the rest and must not flatten the curve.
    low, high = float(mean.min()), np.percentile(mean, 98)
    margin = 0.15 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - margin), max(high, float(np.median(mean))) + margin)


def plot_surprisal(
    path: str | os.PathLike[str],
    curve: tuple[ArrayLike, ArrayLike],
    by_position: tuple[ArrayLike, ArrayLike, ArrayLike],
    *,
    title: str = "",
) -> None:
    """Draw the surprisal of a book along its length, and the loss by distance from its beginning.

    ``curve`` holds the middle of each chunk (tokens) and its mean surprisal (nats), ``(n,)`` each; ``by_position`` the
    position (from 1), mean surprisal (nats) and standard error, ``(m,)`` each.
    """
    figure = create_figure(10, 6.4, title)
    upper, lower = figure.subplots(2, 1, height_ratios=(1.25, 1))
    note = "band: one standard deviation between chunks"
    style_axes(upper, "Surprisal along the book", "tokens read", "nats per token", note)
    _draw_surprisal_curve(upper, curve)
    lower_title = "Loss by position: the value of a longer context"
    style_axes(lower, lower_title, "position in the book (tokens)", "nats per token", "bars: standard error")
    _draw_loss_by_position(lower, by_position)
    save_figure(figure, path)


def _enumerate_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], x_name: str, y_name: str
) -> Iterator[tuple[str, FloatArray, FloatArray, str, str]]:
    """Yield the name, x, y, color and line style of each curve; styles change when the colors are used up."""
    for index, (name, (x, y)) in enumerate(curves.items()):
        x_column, y_column = as_equal_columns(**{x_name: x, y_name: y})
        yield name, x_column, y_column, PALETTE[index % len(PALETTE)], ("-", "--", ":")[index // len(PALETTE) % 3]


def plot_loss_curves(
    path: PlotTarget,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "Loss",
    x_label: str = "step",
    y_label: str = "nats per token",
) -> None:
    """Draw losses over training steps: smoothed curves over pale raw ones.

    ``curves`` maps a name to (steps, losses), ``(n,)`` each.
    """
    if not curves:
        raise MemtxError("A loss plot needs at least one curve, got none.")
    figure = create_figure(9, 4.6)
    axes = figure.subplots()
    style_axes(axes, title, x_label, y_label)
    for name, step, loss, color, _ in _enumerate_curves(curves, "steps", "losses"):
        radius = len(loss) // 80
        if radius:
            axes.plot(step, loss, color=color, linewidth=0.7, alpha=0.25)
        axes.plot(step, moving_average(loss, radius), color=color, linewidth=1.8, label=name)
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOR)
    save_figure(figure, path)


def plot_by_distance(
    path: PlotTarget,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """Draw values over distances, or positions, above 0 on a logarithmic axis.

    ``curves`` maps a name to (distances, values), ``(n,)`` each.
    """
    figure = create_figure(8, 4.4)
    axes = figure.subplots()
    style_axes(axes, title, x_label, y_label)
    for name, x, y, color, style in _enumerate_curves(curves, "distances", "values"):
        axes.plot(x, y, color=color, linewidth=1.8, linestyle=style, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOR)
    save_figure(figure, path)


def plot_accuracy(
    path: str | os.PathLike[str],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    chance_level: float,
    title: str = "Accuracy",
    x_label: str = "distance (tokens)",
) -> None:
    """Draw accuracy over distance on a logarithmic axis, with the chance level (from 0 to 1).

    ``curves`` maps a name to (distances from 1, accuracies from 0 to 1), ``(n,)`` each.
    """
    if not curves:
        raise MemtxError("An accuracy plot needs at least one curve, got none.")
    figure = create_figure(8, 4.4)
    axes = figure.subplots()
    style_axes(axes, title, x_label, "accuracy")
    for name, x, y, color, style in _enumerate_curves(curves, "distances", "accuracies"):
        axes.plot(x, y, color=color, linewidth=1.8, linestyle=style, marker="o", markersize=3.5, label=name)
    axes.axhline(chance_level, color=MUTED_COLOR, linewidth=0.9, linestyle=DASHED, label="chance")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    # Few distances may lie between two powers of ten: label the distances of the longest curve.
    axes.set_xticks(np.asarray(max((distances for distances, _ in curves.values()), key=len), dtype=np.float64))
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "handlelength": 3.5}
    axes.legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOR, **legend)
    save_figure(figure, path)


def plot_model_comparison(
    path: str | os.PathLike[str], panels: Mapping[str, Sequence[float]], model_names: Sequence[str], *, title: str = ""
) -> None:
    """Draw one panel per measure, with a labeled bar per model; the first is on top, in another color.

    ``panels`` maps a measure to one value per model, finite and not negative.
    """
    if not panels or not model_names:
        raise MemtxError("A comparison of models needs a measure and a model.")
    for measure, values in panels.items():
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (len(model_names),) or not np.isfinite(array).all() or (array < 0).any():
            raise MemtxError(f"'{measure}' is {list(values)}, expected {len(model_names)} finite values, none below 0.")
    figure = create_figure(2.2 + 2.6 * len(panels), 1.3 + 0.45 * len(model_names), title)
    labels = model_names
    for axes, (measure, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        style_axes(axes, measure, "", "")
        heights = np.arange(len(model_names))[::-1]
        axes.barh(heights, values, height=0.55, color=[MUTED_COLOR, *[BLUE] * (len(model_names) - 1)], linewidth=0)
        for height, value in zip(heights, values, strict=True):
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            axes.annotate(text, (value, height), (4, 0), color=TEXT_COLOR, **OFFSET_LABEL)
        axes.set_yticks(heights, labels, fontsize=9, color=TEXT_COLOR)
        labels = [""] * len(model_names)
        axes.set_xlim(0, 1.3 * max(*values, 1e-9))
        axes.xaxis.set_major_formatter(FuncFormatter(format_count))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    save_figure(figure, path)


def plot_seed_comparison(
    path: str | os.PathLike[str],
    results: Mapping[str, Sequence[float]],
    *,
    title: str = "Comparison",
    unit: str = "",
    lower_is_better: bool = True,
) -> None:
    """Draw one row per variant, the best mean on top: a dot per seed, a line for the mean, a band for the range.

    ``results`` maps a name to one or more values, one per seed; ``unit`` is their unit.
    """
    if not results:
        raise MemtxError("A comparison needs at least one row, got none.")
    for name, seed_values in results.items():
        if not len(seed_values) or not np.isfinite(np.asarray(seed_values, dtype=np.float64)).all():
            raise MemtxError(f"Row '{name}' is {list(seed_values)}, expected finite values, one per seed.")
    # The axis grows upwards, so the best row comes last.
    table = sorted(results.items(), key=lambda row: float(np.mean(row[1])), reverse=lower_is_better)
    figure = create_figure(8.5, 1.5 + 0.46 * len(table))
    axes = figure.subplots()
    direction = "lower" if lower_is_better else "higher"
    style_axes(axes, title, f"{unit + ', ' if unit else ''}{direction} is better", "")
    axes.grid(False, axis="y")
    for height, (_, seed_values) in enumerate(table):
        values = np.asarray(seed_values, dtype=np.float64)
        mean, is_best = float(values.mean()), height == len(table) - 1
        color = BLUE if is_best else MUTED_COLOR
        axes.barh(height, np.ptp(values), left=values.min(), height=0.42, color=color, alpha=0.2, linewidth=0)
        axes.plot([mean, mean], [height - 0.26, height + 0.26], color=color, linewidth=2.2)
        axes.scatter(values, np.full(len(values), height), s=16, color=color, zorder=3, linewidth=0)
        text = f"{mean:,.0f}" if abs(mean) >= 10_000 else f"{mean:.4g}"
        text += f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
        weight, coordinates = "bold" if is_best else "normal", ("axes fraction", "data")
        axes.annotate(
            text, (1.01, height), None, coordinates, va="center", fontsize=8.5, color=TEXT_COLOR, weight=weight
        )
    axes.set_yticks(range(len(table)), [name for name, _ in table], fontsize=9, color=TEXT_COLOR)
    axes.set_ylim(-0.6, len(table) - 0.4)
    # Otherwise the axis would end where a bar ends and cut off half of a dot.
    axes.use_sticky_edges = False
    axes.margins(x=0.08)
    save_figure(figure, path)


def plot_intervals(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    title: str = "Differences",
    unit: str = "",
) -> None:
    """Draw panels of differences, one above the other: a dot for each mean, a bar over its interval.

    ``panels`` maps a title to intervals, (mean, low, high) by name. Intervals that leave out zero are in color: blue
    below zero, orange above.
    """
    if not panels or not all(panels.values()):
        raise MemtxError("A plot of intervals needs at least one panel, and an interval in each.")
    for name, interval in (item for intervals in panels.values() for item in intervals.items()):
        mean, low, high = interval
        if not np.isfinite(interval).all() or not low <= mean <= high:
            raise MemtxError(f"Interval '{name}' is {tuple(interval)}, expected finite numbers (mean, low, high).")
    heights = list(map(len, panels.values()))
    figure = create_figure(9, 1.2 + 0.34 * sum(heights) + 0.6 * len(panels), title)
    all_axes = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, height_ratios=[size + 0.8 for size in heights]
    )
    for axes, (name, intervals) in zip(all_axes[:, 0], panels.items(), strict=True):
        style_axes(axes, name, f"{unit}, lower is better" if axes is all_axes[-1, 0] else "", "")
        axes.grid(False, axis="y")
        axes.axvline(0.0, color=MUTED_COLOR, linewidth=0.9, linestyle=DASHED)
        # The axis grows upwards, and the first interval is on top.
        for height, (mean, low, high) in enumerate(reversed(list(intervals.values()))):
            color = BLUE if high < 0 else ORANGE if low > 0 else MUTED_COLOR
            axes.plot([low, high], [height, height], color=color, linewidth=5, alpha=0.3, solid_capstyle="butt")
            axes.scatter([mean], [height], s=22, color=color, zorder=3, linewidth=0)
            style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": TEXT_COLOR}
            axes.annotate(f"{mean:+.3f}", (1.01, height), None, ("axes fraction", "data"), **style)
        axes.set_yticks(range(len(intervals)), list(intervals)[::-1], fontsize=8, color=TEXT_COLOR)
        axes.set_ylim(-0.6, len(intervals) - 0.4)
        axes.tick_params(labelbottom=True)
    save_figure(figure, path)
