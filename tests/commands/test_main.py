from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memtx
from memtx.cli import errors, options
from memtx.cli.main import COMMANDS, main
from memtx.errors import DataError

HOME = Path(memtx.__file__).parent.parent


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return result.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["raed"], ["read", "--help"], ["generate", "--help"], ["serve", "--help"]]
)
def test_help_version_and_typos_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys, json, contextlib, io\nfrom memtx.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({arguments!r})\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    modules = set(json.loads(run_python(code)))
    assert not modules & {"torch", "lightning", "numpy", "jsonargparse", "matplotlib", "torchmetrics"}


def test_read_and_generate_do_not_import_lightning() -> None:
    code = (
        "import sys\nimport memtx.cli.generate, memtx.cli.report, memtx.checkpoint.load, memtx.inference.generate\n"
        "print('lightning' in sys.modules, 'torchmetrics' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "False", "False"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memtx {memtx.__version__}\n"


def test_an_unknown_command_is_one_line_with_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Did you mean 'generate'?" in error
    assert main(["xyzzy"]) == 2
    assert "--help" in capsys.readouterr().err


def test_help_shows_the_name_the_program_was_called_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv0, name in (("/usr/bin/lightning", "lightning"), ("/x/memtx/__main__.py", "memtx")):
        monkeypatch.setattr(sys, "argv", [argv0, "--help"])
        assert main() == 0
        assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_a_command_gets_argv_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from memtx.cli import read

    calls: list[list[str]] = []
    monkeypatch.setattr(read, "main", lambda argv: calls.append(argv) or 7)
    assert main(["read", "a", "--b"]) == 7
    assert calls == [["a", "--b"]]


def raise_error(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DataError("Problem in\ntwo lines.", "A hint."), 2, "memtx: error: Problem in two lines. A hint.\n"),
        (FileNotFoundError(2, "x", "/no/such"), 2, "memtx: error: '/no/such' does not exist. Check the path.\n"),
        (IsADirectoryError(21, "x", "d"), 2, "memtx: error: 'd' is a folder, expected a file. Check the path.\n"),
        (PermissionError(13, "x", "p"), 2, "memtx: error: 'p' cannot be opened (permission denied). Check the path.\n"),
        (KeyboardInterrupt("saved"), 130, "\nmemtx: interrupted: saved\n"),
    ],
)
def test_user_errors_are_one_line(
    error: BaseException, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(lambda: raise_error(error)) == code
    assert capsys.readouterr().err == expected


def test_traceback_option_prints_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda: raise_error(DataError("bad.")), traceback=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_internal_errors_are_not_caught() -> None:
    for error in (RuntimeError("bug"), FileNotFoundError("no path"), ValueError("bug")):
        with pytest.raises(type(error)):
            errors.run(lambda error=error: raise_error(error))


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    body = "lambda: [print('x' * 100) for _ in range(9999)] and 0"
    code = f"import sys\nfrom memtx.cli.errors import run\nsys.exit(run({body}))"
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(HOME)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == 141


@pytest.mark.parametrize(
    ("message", "keys", "expected"),
    [
        ("unrecognized arguments: --model.dimm=3", ["--model.dim"], "--model.dimm=3. Did you mean '--model.dim'?"),
        ("Option 'dimm' is not accepted", ["model.dim", "rate"], "'dimm' is not accepted. Did you mean 'model.dim'?"),
        (
            'Parser key "model.lr":\n  Expected a float. Got value: abc',
            [],
            'key "model.lr": Expected a float. Got value: abc',
        ),
        ("", [], "could not be parsed"),
        ("Option 'zzzzzz' is not accepted", ["dim"], "Option 'zzzzzz' is not accepted"),
        (
            'Parser key "model.model":\n  Does not validate against any of the Union subtypes\n  Errors:\n'
            "    - Option 'ratee' is not accepted\n    - Not of type None\n  Given value type: dict",
            ["rate"],
            "Option 'ratee' is not accepted. Did you mean 'rate'?",
        ),
    ],
)
def test_a_parser_message_is_shortened_to_its_reason(message: str, keys: list[str], expected: str) -> None:
    text = errors.shorten_message(message, keys)
    assert text.endswith(expected)
    assert "\n" not in text


def test_a_long_message_is_truncated() -> None:
    assert len(errors.shorten_message("x" * 5000, [])) < 420


def test_a_mistyped_option_is_reported_before_a_missing_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.Parser("memtx x", "")
    parser.add_argument("--checkpoint", required=True)
    for argv in (["--checkpont", "a"], ["--checkpont=a"], ["--checkpoint", "a", "--tracebak"]):
        with pytest.raises(SystemExit) as exit_:
            parser.parse(argv)
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        assert error.count("\n") == 1
        assert "Did you mean '--checkpoint'?" in error or "Did you mean '--traceback'?" in error
    assert parser.parse(["--checkpoint", "a"]) == argparse.Namespace(checkpoint="a", traceback=False)
