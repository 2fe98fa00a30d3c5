"""``memtx predict`` reads input of any size line by line, and an interruption leaves whole lines to continue."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memtx.cli.main import main
from memtx.cli.prediction_output import deferred_interrupt
from memtx.inference.predictor import Predictor
from tests.tasks import predictor, records, write_lines

NUM_LINES = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    predictor("classification").save(path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", records("classification", NUM_LINES))


class Stream(io.RawIOBase):
    """Standard input that calls a function before each line."""

    def __init__(self, lines: list[bytes], before_line: Any) -> None:
        self.lines, self.before_line = lines, before_line

    def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]
        for number, line in enumerate(self.lines, 1):
            self.before_line(number)
            yield line


def read_from(monkeypatch: pytest.MonkeyPatch, lines: list[bytes], before_line: Any = lambda number: None) -> None:
    monkeypatch.setattr(sys, "stdin", type("Input", (), {"buffer": Stream(lines, before_line)})())


def test_predictions_are_written_while_the_input_arrives(
    model: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_written: list[int] = []

    def watch(number: int) -> None:
        if number == NUM_LINES:
            num_written.append(capsys.readouterr().out.count("\n"))

    read_from(monkeypatch, inputs.read_bytes().splitlines(keepends=True), watch)
    assert main(["predict", "--checkpoint", str(model), "-"]) == 0
    assert num_written == [128]
    assert capsys.readouterr().out.count("\n") == NUM_LINES - 128


def test_a_bad_line_of_a_stream_is_named_after_the_lines_before_it(
    model: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = inputs.read_bytes().splitlines(keepends=True)
    lines[99] = b'{"text": \n'
    read_from(monkeypatch, lines)
    assert main(["predict", "--checkpoint", str(model), "-"]) == 2
    output = capsys.readouterr()
    assert output.out.count("\n") == 99
    assert "standard input', line 100: Not JSON" in output.err
    assert output.err.count("\n") == 1


def test_an_interrupted_file_is_continued(
    model: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", "--checkpoint", str(model), "--input", str(inputs), "--output"]
    complete, resumed = inputs.with_name("complete"), inputs.with_name("resumed")
    partial = inputs.with_name("resumed.partial")
    assert main([*command, str(complete)]) == 0
    assert complete.read_bytes().count(b"\n") == NUM_LINES
    predict, num_calls = Predictor.predict, [0]

    def interrupt(self: Predictor, inputs: Any, **options: Any) -> Any:
        num_calls[0] += 1
        if num_calls[0] == 3:
            raise KeyboardInterrupt
        return predict(self, inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", interrupt)
        assert main([*command, str(resumed)]) == 130
    err = capsys.readouterr().err
    assert "128 lines are in" in err
    assert "--resume" in err
    assert not resumed.exists()
    assert partial.read_bytes().count(b"\n") == 128
    # As after a kill in the middle of a line.
    partial.write_bytes(partial.read_bytes() + b'{"label": ')
    assert main([*command, str(resumed)]) == 2
    assert "holds the lines of an interrupted run" in capsys.readouterr().err
    assert main([*command, str(resumed), "--resume"]) == 0
    assert resumed.read_bytes() == complete.read_bytes()
    assert not partial.exists()
    for options, message in ((["--resume"], "--resume continues a file"), (["--output", "no/o"], "does not exist")):
        with pytest.raises(SystemExit) if "--output" in options else monkeypatch.context():
            assert main([*command[:-1], *options]) == 2
        assert message in capsys.readouterr().err


def test_an_input_that_cannot_be_predicted_keeps_the_lines_before_it(
    model: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inputs.open("a") as file:
        file.write('{"text": "' + "a " * 100 + '"}\n')
    output = inputs.with_name("out")
    command = ["predict", "--checkpoint", str(model), str(inputs), "--output", str(output)]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"line {NUM_LINES + 1}: The text has 100 tokens" in err
    assert "128 lines are in" in err
    assert err.count("\n") == 1
    write_lines(inputs, records("classification", NUM_LINES))
    assert main([*command, "--resume"]) == 0
    assert output.read_bytes().count(b"\n") == NUM_LINES


def test_an_array_is_no_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text('[{"text": "a"}]')
    assert main(["predict", "--checkpoint", str(model), str(tmp_path / "in.json")]) == 2
    assert "is a JSON array" in capsys.readouterr().err
    # A byte order mark does not turn lines into a text.
    (tmp_path / "in").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert main(["predict", "--checkpoint", str(model), str(tmp_path / "in")]) == 0
    assert "label" in json.loads(capsys.readouterr().out)


def test_an_interrupt_waits_for_the_end_of_a_block() -> None:
    completed: list[int] = []

    def write() -> None:
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            completed.append(1)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert completed == [1]
