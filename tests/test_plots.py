from __future__ import annotations

import ast
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx import plots
from memtx.errors import MemtxError


def image_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 40))
def test_moving_average_uses_existing_neighbors(values: list[float], radius: int) -> None:
    expected = [np.mean(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]
    # Sums of at most 30 values up to 100, differenced.
    np.testing.assert_allclose(plots.moving_average(values, radius), expected, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_surprisal_plot_is_a_png_of_fixed_size(tmp_path: Path, count: int) -> None:
    position = np.arange(count) + 0.5
    plots.plot_surprisal(
        tmp_path / "a.png", (position, np.ones(count)), (position, np.ones(count), np.zeros(count)), title="$B"
    )
    assert image_size(tmp_path / "a.png") == (1500, 960)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_loss_curves_and_seed_comparisons_are_plotted(tmp_path: Path) -> None:
    plots.plot_loss_curves(
        tmp_path / "b.png", {"train": (range(500), np.random.default_rng(0).random(500)), "val": ([0], [1])}
    )
    plots.plot_seed_comparison(tmp_path / "c.png", {"ours": [1.0, 1.1], "theirs": [1.2]}, unit="bits per byte")
    assert min(*image_size(tmp_path / "b.png"), *image_size(tmp_path / "c.png")) > 300


def test_accuracy_is_plotted_and_invalid_curves_refused(tmp_path: Path) -> None:
    curves = {f"curve {number}": ([24, 960], [0.5, 1 / (1 + number)]) for number in range(9)}
    plots.plot_accuracy(tmp_path / "a.png", {**curves, "short": ([24], [1.0])}, chance_level=0.1)
    assert min(image_size(tmp_path / "a.png")) > 300
    with pytest.raises(MemtxError, match="at least one curve"):
        plots.plot_accuracy(tmp_path / "b.png", {}, chance_level=0.1)
    with pytest.raises(MemtxError, match="non-empty columns of equal length"):
        plots.plot_accuracy(tmp_path / "b.png", {"a": ([1, 2], [1])}, chance_level=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_comparison_grows_with_its_entries(tmp_path: Path) -> None:
    plots.plot_seed_comparison(tmp_path / "a.png", {"a": [1.0]})
    plots.plot_seed_comparison(tmp_path / "b.png", {str(row): [float(row)] for row in range(12)})
    assert image_size(tmp_path / "b.png")[1] > 2 * image_size(tmp_path / "a.png")[1]


def test_intervals_are_drawn_in_panels_and_invalid_ones_refused(tmp_path: Path) -> None:
    intervals = {"better": (-0.1, -0.2, -0.05), "unclear": (0.0, -0.1, 0.1), "worse": (0.1, 0.05, 0.2)}
    plots.plot_intervals(tmp_path / "a.png", {"one": intervals}, title="a", unit="bits per byte")
    plots.plot_intervals(tmp_path / "b.png", {"one": intervals, "two": {**intervals, "another": (0.1, 0.1, 0.1)}})
    assert image_size(tmp_path / "b.png")[1] > image_size(tmp_path / "a.png")[1] > 200
    for panels in ({}, {"one": {}}, {"one": {"x": (0.3, 0.0, 0.2)}}, {"one": {"x": (float("nan"), 0.0, 0.2)}}):
        with pytest.raises(MemtxError, match=r"at least one panel|'x'.*expected finite"):
            plots.plot_intervals(tmp_path / "c.png", panels)
    assert not (tmp_path / "c.png").exists()


def test_invalid_input_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(MemtxError, match="non-empty columns of equal length"):
        plots.plot_surprisal(tmp_path / "a.png", ([1, 2], [1]), ([1], [1], [1]))
    with pytest.raises(MemtxError, match="non-empty columns of equal length"):
        plots.plot_surprisal(tmp_path / "a.png", ([], []), ([1], [1], [1]))
    with pytest.raises(MemtxError, match="at least one row"):
        plots.plot_seed_comparison(tmp_path / "a.png", {})
    with pytest.raises(MemtxError, match=r"'x'.*finite"):
        plots.plot_seed_comparison(tmp_path / "a.png", {"x": [float("nan")]})
    with pytest.raises(MemtxError, match="at least one curve"):
        plots.plot_loss_curves(tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


def test_plots_import_no_pyplot_and_no_models() -> None:
    tree = ast.parse(Path(plots.__file__).read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("memtx.")} == {"memtx.errors"}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not {"matplotlib.pyplot", "pylab"} & imported


def test_model_comparison_has_one_panel_per_measure(tmp_path: Path) -> None:
    plots.plot_model_comparison(
        tmp_path / "a.png", {"parameters": [9e6, 3e6], "ms": [2.5, 0.0]}, ["teacher", "student"], title="both"
    )
    plots.plot_model_comparison(tmp_path / "b.png", {"ms": [2.5, 0.0, 1.0]}, ["teacher", "student", "other"])
    (wide, _), (narrow, _) = image_size(tmp_path / "a.png"), image_size(tmp_path / "b.png")
    assert wide > narrow > 300
    with pytest.raises(MemtxError, match="needs a measure and a model"):
        plots.plot_model_comparison(tmp_path / "c.png", {}, ["teacher"])
    with pytest.raises(MemtxError, match="expected 1 finite values"):
        plots.plot_model_comparison(tmp_path / "c.png", {"ms": [float("nan")]}, ["teacher"])
    assert not (tmp_path / "c.png").exists()
