"""Series on the command line: fit, test, predictions of files and standard input, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.commands.program import HOME, Done, Program

SMALL = {"dim": 16, "depth": 1, "heads": 2}


def write_series(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["level,temp", *(",".join(map(str, line)) for line in values.tolist()), ""]))
    return path


def fit(program: Program, at: Path, *options: str) -> Done:
    backbone = "--model.init_args.model.init_args.backbone.init_args."
    small = [word for name, value in SMALL.items() for word in (f"{backbone}{name}", str(value))]
    steps = ("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--data.init_args.cache_dir", "cache")
    shape = ("--data.init_args.batch_size", "2", "--data.init_args.segment_length", "8")
    config = str(HOME / "configs" / "series.yaml")
    return program("fit", "--config", config, "--run_dir", "run", *shape, *small, *steps, *options, cwd=at)


@pytest.fixture(scope="module")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("series")
    for name, seed in (("train/x", 0), ("validation/y", 1), ("test/z", 2)):
        write_series(
            at / "data" / f"{name}.csv", np.random.default_rng(seed).standard_normal((120, 2)) * [1, 5] + [0, 20]
        )
    done = fit(program, at, "--data.root", "data")
    assert done.code == 0, done.err
    assert "Test it with" in done.out
    return at


def test_a_run_is_tested_and_its_model_predicts(program: Program, run: Path) -> None:
    tested = program("test", "--run_dir", "run", cwd=run)
    assert tested.code == 0, tested.err
    assert "test_mse" in tested.out
    assert "predict FILE --checkpoint" in tested.out
    words = ("predict", "data/test/z.csv", "--checkpoint", "run")
    done = program(*words, "--forecast", "3", "--output", "out.jsonl", "--plot", "p.png", cwd=run)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (run / "out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 121), 120, 121, 122]
    assert set(lines[0]["mean"]) == set(lines[0]["std"]) == {"level", "temp"}
    assert [line.get("forecast", False) for line in lines[-4:]] == [False, True, True, True]
    assert lines[-3]["mean"] == lines[-4]["mean"]
    assert 10 < lines[5]["mean"]["temp"] < 30  # the units of the series
    assert (run / "p.png").stat().st_size > 1000
    printed = program(*words, cwd=run)
    assert [json.loads(line) for line in printed.out.splitlines()] == lines[:120]


def test_mistakes_are_one_line(program: Program, run: Path) -> None:
    write_series(run / "nan.csv", np.array([[1.0, 2.0], [np.nan, 3.0]]))
    (run / "other.csv").write_text("level,heat\n1,2\n")
    (run / "text.txt").write_text("a")
    predict = ("predict", "--checkpoint", "run")
    cases = {
        (*predict, "nan.csv"): "'nan.csv', line 3, column 'level': the value is missing",
        (*predict, "other.csv"): "no column 'temp'",
        (*predict, "text.txt"): "Give a file ending in .csv, .tsv or .npy",
        (*predict, "--text", "a"): "--text is for models of texts",
        ("predict", "--run_dir", "run"): "memtx predict FILE --checkpoint",
    }
    for words, message in cases.items():
        done = program(*words, cwd=run)
        assert done.code == 2, words
        assert len(done.err.splitlines()) == 1, done.err
        assert message in done.err
        assert not done.out  # the file is checked before its first line is answered
    for name, message in (("nan.csv", "the value is missing"), ("none", "does not exist")):
        done = fit(program, run, "--run_dir", f"run-{name}", "--data.root", name)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        assert message in done.err
        assert not (run / f"run-{name}").exists()
    done = fit(program, run, "--run_dir", "run-root")
    assert done.code == 2
    assert "data.root is not set, expected the folder of series" in done.err
