"""``memtx predict`` and ``memtx serve`` with task models: valid and invalid input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtx.cli.main import main
from tests.commands.program import HOME, Program
from tests.commands.tiny import pretrained
from tests.tasks import KINDS, folder, predictor, records, write_lines


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of every kind."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind in KINDS:
        predictor(kind).save(folder / kind)
    pretrained(folder / "language")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["predict", *arguments])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_gives_a_line(workdir: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = records(kind, 70)
    path = write_lines(tmp_path / "in.jsonl", inputs)
    code, out, err = run(capsys, "--checkpoint", str(workdir / kind), "--input", str(path))
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines == predictor(kind).predict(inputs[:64]) + predictor(kind).predict(inputs[64:])
    code, out_to_file, _ = run(capsys, "--checkpoint", str(workdir / kind), str(path), "--output", str(tmp_path / "o"))
    assert (code, out_to_file) == (0, "")
    assert (tmp_path / "o").read_text() == out


def test_raw_texts_are_accepted(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(workdir / "tagging")
    code, out, _ = run(capsys, "--checkpoint", model, "--text", "the white whale", "--text", "Ahab saw")
    assert code == 0
    assert [len(json.loads(line)["tags"]) for line in out.splitlines()] == [3, 2]
    (tmp_path / "a.txt").write_text("the white whale\n\nlost at sea\n")
    assert len(json.loads(run(capsys, "--checkpoint", model, "--input", str(tmp_path / "a.txt"))[1])["tags"]) == 6
    read = subprocess.run(
        [sys.executable, "-m", "memtx", "predict", "--checkpoint", model, "-"],
        input='{"text": "störm"}\n{"tokens": ["a"]}\n'.encode(), capture_output=True,
        env=os.environ | {"PYTHONPATH": str(HOME)}, timeout=60, check=False,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    assert [json.loads(line)["tokens"] for line in read.stdout.splitlines()] == [["störm"], ["a"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "a"], "arguments are required: --checkpoint"),
        (["--checkpoint", "none", "--text", "a"], "'none' does not exist"),
        (
            ["--checkpoint", "language", "--text", "a"],
            "'language' is a language model, not a task model. Use memtx read",
        ),
        (["--checkpoint", "tagging"], "one source of texts"),
        (["--checkpoint", "tagging", "--text", "a", "-"], "one source of texts"),
        (["--checkpoint", "tagging", "--input", "none.jsonl"], "'none.jsonl' does not exist"),
        (["--checkpoint", "tagging", "--input", "."], "expected a file"),
        (["--checkpoint", "tagging", "--text", " "], "The text is empty"),
        (["--checkpoint", "tagging", "--text", "a", "--device", "abacus"], "--device abacus cannot be used"),
        (["--checkpoint", "matching", "--text", "a"], "compares two texts"),
        (["--checkpoint", "questions", "--text", "a"], "a question about a context"),
        (["--checkpoint", "classification", "--text", "a " * 100], "fit into what the model reads at once"),
        (["--checkpoint", "tagging", "--run_dir=there"], "--run_dir for the test texts of a run"),
        (["--checkpoint", "tagging", "--txet", "a"], "Did you mean '--text'?"),
        (["--checkpoint", "classification", "--input", "bad.jsonl"], "bad.jsonl', line 2: Not JSON"),
        (["--checkpoint", "classification", "--input", "other.jsonl"], "other.jsonl', line 1: There is no 'text'"),
        (["--checkpoint", "classification", "--input", "long.jsonl"], "long.jsonl', line 3: The text has"),
        (["--checkpoint", "classification", "--input", "empty.jsonl"], "empty.jsonl' is empty"),
        (["--checkpoint", "classification", "--input", "latin.txt"], "latin.txt' is not UTF-8"),
    ],
)
def test_errors_are_one_line(
    workdir: Path,
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workdir)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("other.jsonl").write_text('{"txt": "a"}\n')
    Path("long.jsonl").write_text('{"text": "a"}\n\n{"text": "' + "a " * 100 + '"}\n')
    Path("empty.jsonl").write_text("\n")
    Path("latin.txt").write_bytes("störm".encode("latin-1"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_a_task_model_is_served(workdir: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    httpx = pytest.importorskip("httpx", reason="the package 'httpx' is not installed")
    server = subprocess.Popen(
        [sys.executable, "-m", "memtx", "serve", "--checkpoint", str(workdir / "tagging"), "--port", "0"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(HOME)}, cwd=workdir,
    )  # fmt: skip
    assert server.stderr is not None
    try:
        first = server.stderr.readline()
        assert "serving 'tagging'" in first
        assert "POST /v1/predict" in first
        address = first.split(" at ")[1].split()[0]
        response = httpx.post(f"{address}/v1/predict", json={"input": "the white whale"}, timeout=30).json()
        assert len(response["data"][0]["tags"]) == 3
        response = httpx.post(f"{address}/v1/predict", json={"text": "the white whale"}, timeout=30).json()
        assert "the fields are input, model" in response["error"]["message"]
        assert not (workdir / "sessions").exists()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        server.stderr.close()
    assert server.returncode in (0, -signal.SIGTERM)  # as uvicorn ends


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--data.task.max_lenght", "64"], "Did you mean"),
        (["--data.batch_size", "0"], "batch_size is 0"),
        (["--data.task.max_length", "4"], "max_length is 4"),
        (["--model.token_mask_prob", "2"], "token_mask_prob is 2"),
        (["--data.root", "none"], "'none' is no folder"),
        (["--data.root", "null"], "data.root is not set"),
    ],
)
def test_an_error_in_the_config_of_a_task_is_one_line(
    program: Program, tmp_path: Path, changes: list[str], expected: str
) -> None:
    root = str(folder(tmp_path / "data", "tagging", 8))
    config = str(HOME / "configs" / "conll2000.yaml")
    result = program("fit", "--config", config, "--data.root", root, *changes, cwd=tmp_path)
    assert result.code == 2
    assert expected in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_invalid_example_stops_a_run_before_it_starts(program: Program, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "tagging", 8)
    with (root / "validation.jsonl").open("a") as handle:
        handle.write('{"tokens": ["a"], "tags": ["B-NEW"]}\n')
    config = str(HOME / "configs" / "conll2000.yaml")
    result = program("fit", "--config", config, "--data.root", str(root), cwd=tmp_path)
    assert result.code == 2
    assert "validation.jsonl', line 9: The label 'B-NEW' was never seen in training" in result.err
    assert not (tmp_path / "runs" / "conll2000").exists()


def test_a_config_with_one_class_path_is_refused(program: Program, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {class_path: memtx.training.finetuning.TaggingModule}\n")
    result = program("fit", "--config", "c.yaml", cwd=tmp_path)
    assert result.code == 2
    assert "Only one of model and data has a class_path; 'data' has none" in result.err
    assert result.err.count("\n") == 1
