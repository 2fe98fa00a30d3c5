"""compare_books.py: paired differences, their intervals, the kinds of tokens, and a whole comparison at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO_ROOT = Path(__file__).parents[1]
SCRIPTS = REPO_ROOT / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the helpers of the script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import book_reading
    import book_tables

    return book_reading, book_tables


def test_tokens_are_told_apart_by_their_last_occurrence(scripts: Any) -> None:
    reading, _ = scripts
    tokens = [0, 1, 1, *range(100, 100 + reading.WINDOW - 2), 1, 2, 0]
    kinds = [reading.KINDS[kind] for kind in reading.classify(tokens)]
    assert kinds[:3] == ["new", "near", "new"]
    # 1 occurred WINDOW - 1 tokens before, which the window still sees, and 0 before the window.
    assert kinds[-3:] == ["near", "new", "seen"]


def test_interval_of_a_paired_difference_covers_seeds_and_books(scripts: Any) -> None:
    _, tables = scripts
    rng = np.random.default_rng(1)
    equal = np.full((3, 4), -0.1)
    assert tables.bootstrap_interval(equal) == pytest.approx((-0.1, -0.1, -0.1))
    by_seed = equal + np.array([[-0.1], [0.0], [0.1]])
    mean, low, high = tables.bootstrap_interval(by_seed)
    assert mean == pytest.approx(-0.1)
    # All draws of one seed have a probability of 1/27 each, above 2.5%.
    assert (low, high) == pytest.approx((-0.2, 0.0))
    noisy = tables.bootstrap_interval(equal + rng.normal(0, 0.01, (3, 4)))
    assert noisy[1] < noisy[0] < noisy[2] < 0


def test_tables_and_picture_pair_runs_of_one_seed(scripts: Any, tmp_path: Path) -> None:
    reading, tables = scripts
    num_cells = int(np.prod(reading.CELLS))

    def run(nats: float, *names: str) -> dict[str, Any]:
        readings = {name: [[nats + index] * num_cells] * 2 for index, name in enumerate(("trained", "step 2", *names))}
        tokens, seconds = [[1] * num_cells] * 2, {"2": 10.0, "4": 20.0}
        return {
            "steps": 4, "parameters": 1000, "state_bytes": 10, "bytes": [100, 100], "tokens": tokens,
            "seconds": seconds, "readings": readings,
        }  # fmt: skip

    runs = {
        "uniform": {0: run(2.0), 1: run(3.0)},
        "windows+copy": {0: run(1.0, "without copy", "copy 384", "copy 1536"), 1: run(2.0, "without copy")},
    }
    difference = -num_cells / 100 / np.log(2)
    assert tables.pair(runs, "windows+copy", "uniform") == pytest.approx(np.full((2, 2), difference))
    lines = [line for format_table in tables.TABLES for line in format_table(runs)]
    assert f"{difference:+.4f} [{difference:+.4f}, {difference:+.4f}], -40.0%" in "".join(lines)
    assert any(line.startswith("| windows 16, 32, 64; copy | without copy |") for line in lines)
    tables.plot_differences(runs, tmp_path / "books.png")
    assert (tmp_path / "books.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_stacks_are_compared_and_read_without_their_sources(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [rng.bytes(3).hex() for _ in range(200)]
    for split, count in (("train", 3), ("validation", 2)):
        (tmp_path / split).mkdir()
        for index in range(count):
            (tmp_path / split / f"{index}.txt").write_text(" ".join(rng.choice(words, 400)))

    def compare(*options: str | Path) -> Any:
        arguments = ["--root", tmp_path, "--output-dir", tmp_path / "runs", "--tokenizer", "bytes", "--steps", "5"]
        process = subprocess.run(
            [sys.executable, SCRIPTS / "compare_books.py", "--json", "-", *arguments, *options], text=True,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)}, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)["runs"]

    table = tmp_path / "books.md"
    runs = compare("--rows", "uniform", "compressed+copy", "--seeds", "0", "--markdown", table)
    uniform, copy = runs["uniform"]["0"], runs["compressed+copy"]["0"]
    assert set(uniform["readings"]) == {"trained", "averaged", *(f"step {step}" for step in (1, 2, 3))}
    assert {"without bank", "without copy", "windows alone", "copy 384"} <= set(copy["readings"])
    for run in (uniform, copy):
        assert run["steps"] == 5
        assert sum(map(sum, run["tokens"])) == sum(run["bytes"])
        assert list(run["seconds"]) == ["1", "2", "3", "4", "5"]
        assert sorted(run["seconds"].values()) == list(run["seconds"].values())
        # 8 bits of chance or less, by book.
        for nats in run["readings"].values():
            assert all(0 < sum(book) / size < 8 for book, size in zip(nats, run["bytes"], strict=True))
    assert copy["state_bytes"] > uniform["state_bytes"]
    assert copy["readings"]["trained"] != copy["readings"]["without copy"] != copy["readings"]["windows alone"]
    assert "| 16, 32, compressed 4:1; copy | without copy |" in table.read_text()
    # Nothing is measured twice.
    assert compare("--rows", "uniform", "--seeds", "0") == runs
