"""Arrays -> PNG: surprise along a book, loss curves, comparisons with seeds and spread.

matplotlib's Figure is used directly, never pyplot: no window, no global state, safe in threads.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
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
DPI = 150

FloatArray = NDArray[np.float64]


def _create_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style_axes(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT_COLOR)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED_COLOR)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED_COLOR)
    axes.tick_params(labelsize=8, colors=MUTED_COLOR, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID_COLOR)
    axes.grid(True, color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)


def _format_count(value: float, _: object = None) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with files.atomic_open(path) as handle:
        handle.write(content.getvalue())


def _as_equal_columns(**columns: ArrayLike) -> list[FloatArray]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns.values()]
    sizes = {array.shape for array in arrays}
    if len(sizes) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        given = ", ".join(f"{name} {array.shape}" for name, array in zip(columns, arrays, strict=True))
        raise MemtxError(f"A plot needs columns of one length of at least 1, got {given}.")
    return arrays


def moving_average(values: ArrayLike, radius: int) -> FloatArray:
    """Return the mean over up to ``2 * radius + 1`` neighbours, fewer at the ends (no padding is made up).

    Args:
        values: (n,).
        radius: neighbours on each side; 0 changes nothing.
    """
    array = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], array.cumsum()])
    place = np.arange(len(array))
    first, last = np.maximum(place - radius, 0), np.minimum(place + radius + 1, len(array))
    averaged: FloatArray = (sums[last] - sums[first]) / (last - first)
    return averaged


def _draw_surprisal_curve(axes: Any, curve: tuple[ArrayLike, ArrayLike]) -> None:
    position, mean = _as_equal_columns(position=curve[0], mean=curve[1])
    reach = max(1, len(mean) // 60)
    line = moving_average(mean, reach)
    # The range of the stretches around: their means' spread, not the single tokens', which would hide the line.
    spread = np.sqrt(np.maximum(moving_average(mean**2, reach) - line**2, 0))
    axes.fill_between(position, line - spread, line + spread, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(position, line, color=BLUE, linewidth=1.8, solid_capstyle="round")
    average = float(np.average(mean))
    axes.axhline(average, color=MUTED_COLOR, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        f"mean\n{average:.2f}",
        (1.0, average),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=8,
        color=MUTED_COLOR,
    )
    axes.set_title("band: one standard deviation between stretches", loc="right", fontsize=8, color=MUTED_COLOR)
    low, high = np.percentile(line - spread, 1), np.percentile(line + spread, 99)
    margin = 0.12 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.set_xlim(0, position[-1] + position[0])
    axes.xaxis.set_major_formatter(FuncFormatter(_format_count))


def _draw_loss_by_position(axes: Any, by_position: tuple[ArrayLike, ArrayLike, ArrayLike]) -> None:
    position, mean, error = _as_equal_columns(position=by_position[0], mean=by_position[1], error=by_position[2])
    axes.errorbar(
        position,
        mean,
        np.where(np.isfinite(error), error, 0.0),
        color=ORANGE,
        ecolor="#f0c8ad",
        elinewidth=2,
        linewidth=1.5,
        marker="o",
        markersize=3.5,
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("bars: standard error", loc="right", fontsize=8, color=MUTED_COLOR)
    # The first tokens' loss is far above all others and must not flatten them.
    high = np.percentile(mean, 98)
    low = float(mean.min())
    margin = 0.15 * max(high - low, 0.1)
    axes.set_ylim(max(0.0, low - margin), max(high, float(np.median(mean))) + margin)


def plot_surprisal(
    path: str | os.PathLike[str],
    curve: tuple[ArrayLike, ArrayLike],
    by_position: tuple[ArrayLike, ArrayLike, ArrayLike],
    *,
    title: str = "",
) -> None:
    """Draw how surprising a book was: along the book, and by distance from its beginning.

    Args:
        path: the PNG to write, whole or not at all.
        curve: middle of each stretch (tokens) and its mean surprise (nats); (n,) each.
        by_position: position (from 1), mean surprise (nats) and standard error; (m,) each.
        title: the book's.

    Raises:
        MemtxError: columns of different lengths, or the file cannot be written.
    """
    figure = _create_figure(10, 6.4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=TEXT_COLOR)
    upper, lower = figure.subplots(2, 1, height_ratios=(1.25, 1))
    _style_axes(upper, "Surprise along the book", "tokens read", "nats per token")
    _draw_surprisal_curve(upper, curve)
    _style_axes(
        lower, "Loss by position: what a longer past is worth", "position in the book (tokens)", "nats per token"
    )
    _draw_loss_by_position(lower, by_position)
    _save_figure(figure, path)


def plot_loss_curves(
    path: str | os.PathLike[str],
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "Loss",
    x_label: str = "step",
    y_label: str = "nats per token",
) -> None:
    """Draw losses over training steps, each smoothed above its pale raw line.

    Args:
        path: the PNG to write.
        curves: name -> (steps, losses), (n,) each.
        title: above the picture.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.

    Raises:
        MemtxError: no curve, or columns of different lengths.
    """
    if not curves:
        raise MemtxError("A loss curve needs at least one curve, got none.")
    figure = _create_figure(9, 4.6)
    axes = figure.subplots()
    _style_axes(axes, title, x_label, y_label)
    for index, (name, (steps, losses)) in enumerate(curves.items()):
        step, loss = _as_equal_columns(steps=steps, losses=losses)
        colour = PALETTE[index % len(PALETTE)]
        reach = len(loss) // 80
        if reach:
            axes.plot(step, loss, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(step, moving_average(loss, reach), color=colour, linewidth=1.8, label=name)
    axes.xaxis.set_major_formatter(FuncFormatter(_format_count))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT_COLOR)
    _save_figure(figure, path)


def plot_accuracy(
    path: str | os.PathLike[str],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    chance_level: float,
    title: str = "Accuracy",
    x_label: str = "distance (tokens)",
) -> None:
    """Draw the share of right answers by distance, beside that of guessing.

    Args:
        path: the PNG to write.
        curves: name -> (distances, shares), (n,) each, distances from 1.
        chance_level: the share of guessing, from 0 to 1.
        title: above the picture.
        x_label: name of the horizontal axis, which is logarithmic.

    Raises:
        MemtxError: no curve, or columns of different lengths.
    """
    if not curves:
        raise MemtxError("A picture of accuracy needs at least one curve, got none.")
    figure = _create_figure(8, 4.4)
    axes = figure.subplots()
    _style_axes(axes, title, x_label, "share of right answers")
    for index, (name, (distances, shares)) in enumerate(curves.items()):
        distance, share = _as_equal_columns(distances=distances, shares=shares)
        # More curves than colours differ by their lines.
        line = ("-", "--", ":")[index // len(PALETTE) % 3]
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(distance, share, color=colour, linewidth=1.8, linestyle=line, marker="o", markersize=3.5, label=name)
    axes.axhline(chance_level, color=MUTED_COLOR, linewidth=0.9, linestyle=(0, (4, 3)), label="chance")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    # A decade may lie between two powers of ten: the distances themselves are named, those of the longest curve.
    axes.set_xticks(np.asarray(max((one for one, _ in curves.values()), key=len), dtype=np.float64))
    axes.xaxis.set_major_formatter(FuncFormatter(_format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(
        frameon=False, fontsize=8, labelcolor=TEXT_COLOR, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.5
    )
    _save_figure(figure, path)


def plot_model_comparison(
    path: str | os.PathLike[str], panels: Mapping[str, Sequence[float]], model_names: Sequence[str], *, title: str = ""
) -> None:
    """Draw models beside one another: a panel a measure, a bar a model, each with its number.

    Args:
        path: the PNG to write.
        panels: measure -> one value a model, finite and not negative.
        model_names: the models, the first on top and in a colour of its own.
        title: above the picture.

    Raises:
        MemtxError: no panel or no model, a value for each of other models, or one that cannot be drawn.
    """
    if not panels or not model_names:
        raise MemtxError("A picture of models beside one another needs a measure and a model.")
    for measure, values in panels.items():
        given = np.asarray(values, dtype=np.float64)
        if given.shape != (len(model_names),) or not np.isfinite(given).all() or (given < 0).any():
            raise MemtxError(f"'{measure}' is {list(values)}, expected {len(model_names)} finite values, none below 0.")
    figure = _create_figure(2.2 + 2.6 * len(panels), 1.3 + 0.45 * len(model_names))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=TEXT_COLOR)
    for place, (axes, (measure, values)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)
    ):
        _style_axes(axes, measure, "", "")
        height = np.arange(len(model_names))[::-1]
        axes.barh(height, values, height=0.55, color=[MUTED_COLOR, *[BLUE] * (len(model_names) - 1)], linewidth=0)
        for at, value in zip(height, values, strict=True):
            text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            axes.annotate(
                text, (value, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=TEXT_COLOR
            )
        axes.set_yticks(height, model_names if not place else [""] * len(model_names), fontsize=9, color=TEXT_COLOR)
        axes.set_xlim(0, 1.3 * max(*values, 1e-9))
        axes.xaxis.set_major_formatter(FuncFormatter(_format_count))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    _save_figure(figure, path)


def plot_seed_comparison(
    path: str | os.PathLike[str],
    results: Mapping[str, Sequence[float]],
    *,
    title: str = "Comparison",
    unit: str = "",
    lower_is_better: bool = True,
) -> None:
    """Draw one row a variant: every seed a dot, the mean a line, the spread (lowest to highest) a band.

    Args:
        path: the PNG to write.
        results: name -> one value a seed, at least one; rows are sorted, the best on top.
        title: above the picture.
        unit: what the values are.
        lower_is_better: decides which row is best, and is said below the picture.

    Raises:
        MemtxError: an empty table or row, or a value that is not finite.
    """
    if not results:
        raise MemtxError("A comparison needs at least one row, got none.")
    for name, seeds in results.items():
        if not len(seeds) or not np.isfinite(np.asarray(seeds, dtype=np.float64)).all():
            raise MemtxError(f"Row '{name}' is {list(seeds)}, expected finite values, one a seed.")
    # The axis grows upwards, so the best row comes last.
    rows = sorted(results.items(), key=lambda row: float(np.mean(row[1])), reverse=lower_is_better)
    figure = _create_figure(8.5, 1.5 + 0.46 * len(rows))
    axes = figure.subplots()
    direction = "lower" if lower_is_better else "higher"
    _style_axes(axes, title, f"{unit + ', ' if unit else ''}{direction} is better", "")
    axes.grid(False, axis="y")
    for height, (_, seeds) in enumerate(rows):
        values = np.asarray(seeds, dtype=np.float64)
        mean, best = float(values.mean()), height == len(rows) - 1
        colour = BLUE if best else MUTED_COLOR
        axes.barh(height, np.ptp(values), left=values.min(), height=0.42, color=colour, alpha=0.2, linewidth=0)
        axes.plot([mean, mean], [height - 0.26, height + 0.26], color=colour, linewidth=2.2)
        axes.scatter(values, np.full(len(values), height), s=16, color=colour, zorder=3, linewidth=0)
        spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
        axes.annotate(
            f"{mean:,.0f}{spread}" if abs(mean) >= 10_000 else f"{mean:.4g}{spread}",
            (1.01, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            fontweight="bold" if best else "normal",
            color=TEXT_COLOR,
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9, color=TEXT_COLOR)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    # A bar's end would otherwise be the axis' end, with half of a dot cut off.
    axes.use_sticky_edges = False
    axes.margins(x=0.08)
    _save_figure(figure, path)
