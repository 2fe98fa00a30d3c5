"""Tables and picture of compare_books.py: paired differences, with bootstrap intervals over seeds and books."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from book_reading import CELLS, KINDS, POSITIONS, TRAINED, WINDOWS_ALONE
from book_stacks import COPY_ENTRIES, STACKS, UNIFORM, WINDOWS
from numpy.typing import NDArray

from memtx import plots

Array = NDArray[np.float64]
Runs = dict[str, dict[int, dict[str, Any]]]
"""Figures by stack and seed."""

NUM_RESAMPLES = 10_000


def load_runs(folder: Path, names: Sequence[str]) -> Runs:
    """Return the figures of all runs that were read to the end, by stack."""
    runs: Runs = {}
    for name in names:
        paths = [path for path in folder.glob("*.json") if path.stem.rpartition("-")[0] == name]
        figures = {int(path.stem.rpartition("-")[2]): json.loads(path.read_text()) for path in paths}
        if figures := {seed: run for seed, run in sorted(figures.items()) if run.get("complete")}:
            runs[name] = figures
    return runs


def bits_per_byte(run: dict[str, Any], reading: str = TRAINED) -> Array:
    """Return a reading's bits per byte by book, ``(books,)``."""
    bits: Array = np.array(run["readings"][reading]).sum(1) / math.log(2) / np.array(run["bytes"])
    return bits


def bits_per_token(run: dict[str, Any], reading: str, axis: int, index: int) -> Array:
    """Return a reading's bits per token by book for one of the classes along an axis of ``CELLS``, ``(books,)``."""
    nats, tokens = (
        np.array(values).reshape(-1, *CELLS).take(index, axis + 1).sum((1, 2))
        for values in (run["readings"][reading], run["tokens"])
    )
    result: Array = nats / math.log(2) / tokens
    return result


def bootstrap_interval(differences: Array) -> tuple[float, float, float]:
    """Return the mean and its 95% interval for differences by seed and book, ``(seeds, books)``.

    Seeds and books are resampled independently, each with replacement.
    """
    rng = np.random.default_rng(0)
    seeds, books = (rng.integers(0, size, (NUM_RESAMPLES, size)) for size in differences.shape)
    means = differences[seeds[:, :, None], books[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def pair(runs: Runs, name: str, base: str) -> Array | None:
    """Return bits per byte less those of another stack, by common seed and book; None without a common seed."""
    seeds = [seed for seed in runs.get(name, {}) if seed in runs.get(base, {})]
    differences = [bits_per_byte(runs[name][seed]) - bits_per_byte(runs[base][seed]) for seed in seeds]
    return np.stack(differences) if differences and name != base else None


def clear(runs: Runs, name: str, reading: str) -> Array | None:
    """Return bits per byte less those of another reading of the same weights, by seed and book."""
    differences = [
        bits_per_byte(run) - bits_per_byte(run, reading) for run in runs[name].values() if reading in run["readings"]
    ]
    return np.stack(differences) if differences else None


def format_interval(differences: Array | None, base: float = 0.0) -> str:
    """Format differences: mean, 95% interval over several seeds, and percentage of ``base`` unless it is 0."""
    if differences is None:
        return ""
    mean, low, high = bootstrap_interval(differences)
    percent = f", {100 * mean / base:+.1f}%" if base else ""
    # Books alone would make an interval that is too short.
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]{percent}" if len(differences) > 1 else f"{mean:+.4f}{percent}"


def base_name(name: str) -> str:
    """Return the uniform window of as many layers as a stack has."""
    return UNIFORM if STACKS[name].depth == STACKS[UNIFORM].depth else f"{UNIFORM}-{STACKS[name].depth}"


def mean_bits(runs: Runs, name: str, reading: str = TRAINED, seeds: Sequence[int] | None = None) -> float:
    """Return the mean bits per byte over books and seeds, those of ``seeds`` that there are or all."""
    chosen = [run for seed, run in runs[name].items() if seeds is None or seed in seeds]
    return float(np.mean([bits_per_byte(run, reading) for run in chosen]))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table, which is left out if it has no rows."""
    if not rows:
        return []
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def format_stacks(runs: Runs) -> list[str]:
    """Format bits per byte by seed, and paired differences with the uniform window and the windows of equal depth."""
    header = ["stack", "parameters", "state bytes", "bits per byte by seed", "mean", "standard error", "CPU s"]
    rows = []
    for name, by_seed in runs.items():
        bits = [float(bits_per_byte(run).mean()) for run in by_seed.values()]
        error = f"{statistics.stdev(bits) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
        run = next(iter(by_seed.values()))
        cells = [STACKS[name].title, f"{run['parameters']:,}", f"{run['state_bytes']:,}"]
        cells += [", ".join(f"{value:.4f}" for value in bits), f"{statistics.mean(bits):.4f}", error]
        cells.append(f"{statistics.mean(map(total_seconds, by_seed.values())):.0f}")
        for base in (base_name(name), WINDOWS):
            differences = pair(runs, name, base) if STACKS[base].depth == STACKS[name].depth else None
            base_bits = 0.0 if differences is None else mean_bits(runs, base, seeds=list(by_seed))
            cells.append(format_interval(differences, base_bits))
        rows.append(cells)
    return format_table([*header, "against the uniform window", "against the windows alone"], rows)


def format_sources(runs: Runs) -> list[str]:
    """Format what each source gains: readings of the same weights with and without it."""
    rows = []
    for name, by_seed in runs.items():
        readings = dict.fromkeys(reading for run in by_seed.values() for reading in run["readings"])
        for reading in readings:
            if reading.startswith("without ") or reading == WINDOWS_ALONE:
                base = mean_bits(runs, name, reading)
                rows.append(
                    [STACKS[name].title, reading, f"{base:.4f}", format_interval(clear(runs, name, reading), base)]
                )
    return format_table(["stack", "same weights", "bits per byte", "gain of what was cleared"], rows)


def format_entries(runs: Runs) -> list[str]:
    """Format bits per byte by the number of entries of the copy memory."""
    readings = [*(f"copy {size}" for size in COPY_ENTRIES[:-1]), TRAINED]
    rows = [
        [STACKS[name].title, *(f"{mean_bits(runs, name, reading):.4f}" for reading in readings)]
        for name, by_seed in runs.items()
        if all(reading in run["readings"] for run in by_seed.values() for reading in readings)
    ]
    return format_table(["copy memory of", *(f"{size:,}" for size in COPY_ENTRIES)], rows)


def format_classes(runs: Runs) -> list[str]:
    """Format paired differences in bits per token by position and by kind of the pair with the previous token."""
    columns = [(axis, index) for axis, size in enumerate(CELLS[:2]) for index in range(size)]
    ranges = [*(f"{start:,}-{end:,}" for start, end in itertools.pairwise(POSITIONS)), f"{POSITIONS[-1]:,}-"]
    rows = []
    for name, by_seed in runs.items():
        baseline = runs.get(base_name(name), {})
        comparisons = {
            f"itself {reading}": [(run, run, reading) for run in by_seed.values() if reading in run["readings"]]
            for reading in ("without copy", "without bank", "without cache")
        }
        if baseline is not by_seed:
            shared = [seed for seed in by_seed if seed in baseline]
            comparisons["the uniform window"] = [(by_seed[seed], baseline[seed], TRAINED) for seed in shared]
        for base, pairs in comparisons.items():
            if pairs:
                differences = [
                    [bits_per_token(run, TRAINED, *cell) - bits_per_token(other, reading, *cell) for cell in columns]
                    for run, other, reading in pairs
                ]
                means = np.mean(differences, axis=(0, 2))
                rows.append([STACKS[name].title, base, *(f"{mean:+.3f}" for mean in means)])
    return format_table(["bits per token of", "against", *ranges, *KINDS], rows)


def total_seconds(run: dict[str, Any]) -> float:
    """Return the CPU seconds of a training."""
    return float(run["seconds"][str(run["steps"])])


def _curve(run: dict[str, Any]) -> dict[int, Array]:
    """Return bits per byte by book at each step that was read."""
    steps = {int(name.partition(" ")[2]): name for name in run["readings"] if name.startswith("step ")}
    return {step: bits_per_byte(run, name) for step, name in sorted((steps | {run["steps"]: TRAINED}).items())}


def format_curve(runs: Runs) -> list[str]:
    """Format mean bits per byte along training, and of the mean of the last weights."""
    curves = {name: [_curve(run) for run in by_seed.values()] for name, by_seed in runs.items()}
    steps = sorted(set.intersection(*(set(curve) for by_seed in curves.values() for curve in by_seed))) if runs else []
    rows = []
    for name, by_seed in curves.items():
        cells = [f"{np.mean([curve[step] for curve in by_seed]):.4f}" for step in steps]
        has_average = all("averaged" in run["readings"] for run in runs[name].values())
        cells.append(f"{mean_bits(runs, name, 'averaged'):.4f}" if has_average else "")
        rows.append([STACKS[name].title, *cells])
    return format_table(["steps", *(f"{step:,}" for step in steps), "weights averaged"], rows)


def bits_at(run: dict[str, Any], seconds: float) -> Array:
    """Return bits per byte by book after some CPU seconds of training, interpolated along the curve."""
    curve = _curve(run)
    times = [run["seconds"][str(step)] for step in curve]
    return np.array([np.interp(seconds, times, bits) for bits in np.stack(list(curve.values())).T])


def format_equal_seconds(runs: Runs) -> list[str]:
    """Format the ranking after as many CPU seconds as the cheapest stack of equal depth takes, best first."""
    lines = []
    for base in dict.fromkeys(map(base_name, runs)):
        group = {name: by_seed for name, by_seed in runs.items() if base_name(name) == base}
        if base not in group:
            continue
        budget = min(statistics.mean(map(total_seconds, by_seed.values())) for by_seed in group.values())
        bits = {name: {seed: bits_at(run, budget) for seed, run in by_seed.items()} for name, by_seed in group.items()}
        rows = []
        for name in sorted(bits, key=lambda name: float(np.mean(list(bits[name].values())))):
            paired = [values - bits[base][seed] for seed, values in bits[name].items() if seed in bits[base]]
            cell = format_interval(np.stack(paired)) if paired and name != base else ""
            rows.append([STACKS[name].title, f"{np.mean(list(bits[name].values())):.4f}", cell])
        lines += format_table([f"after {budget:.0f} CPU s", "bits per byte", "against the uniform window"], rows)
    return lines


TABLES = (format_stacks, format_sources, format_entries, format_classes, format_curve, format_equal_seconds)


def plot_differences(runs: Runs, path: Path) -> None:
    """Plot paired differences over several seeds: against the baselines, and of the same weights."""
    panels: dict[str, dict[str, Array | None]] = {}
    for base in (UNIFORM, WINDOWS):
        names = [name for name in runs if base_name(name) == UNIFORM != name]
        panels[f"against {STACKS[base].title}"] = {STACKS[name].title: pair(runs, name, base) for name in names}
    panels["against the same weights, one source cleared"] = {
        f"{STACKS[name].title} ({reading})": clear(runs, name, reading)
        for name, by_seed in runs.items()
        for reading in next(iter(by_seed.values()))["readings"]
        if reading.startswith("without ")
    }
    intervals = {
        title: {
            name: bootstrap_interval(differences)
            for name, differences in rows.items()
            if differences is not None and len(differences) > 1
        }
        for title, rows in panels.items()
    }
    if intervals := {title: rows for title, rows in intervals.items() if rows}:
        title = "Paired differences on the validation books"
        plots.plot_intervals(path, intervals, title=title, unit="bits per byte")
