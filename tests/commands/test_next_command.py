"""Each command ends with the command to type next, quoted for a shell, and runs on the best device by default."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memtx.cli import options
from memtx.cli.main import OPENMP_WAIT_VARIABLES, shorten_openmp_spin
from memtx.errors import MemtxError
from tests.commands.program import HOME, Program
from tests.commands.runs import write, write_books
from tests.commands.tiny import BOOK, pretrained


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_books(tmp_path / "books")
    (tmp_path / "a book.txt").write_text(BOOK)
    pretrained(tmp_path / "a model")
    write(tmp_path)
    return tmp_path


def test_training_leads_from_command_to_command(program: Program, workdir: Path) -> None:
    """A line that a command printed is run as it is, up to the command that reads a text."""
    result = program("prepare", "books", "--output-dir", "my tokens", "--num-workers", "1", cwd=workdir)
    assert result.out.endswith("Train on it with: memtx fit --data.root 'my tokens'\n")
    plan = ("plan", "--config", "c.yaml", "--data.root", "my tokens", "--run_dir", "my run")
    result = program(*plan, cwd=workdir)
    for command in ("fit", "test", "read"):
        words = shlex.split(result.out.rstrip().splitlines()[-1].partition(" with: ")[2])
        assert words[:2] == ["memtx", command], result
        result = program(*(word if word != "FILE" else "a book.txt" for word in words[1:]), cwd=workdir)
        assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("read 'a book.txt'", "generate --checkpoint 'a model' --prompt-file 'a book.txt'"),
        ("read 'a book.txt' --session 's 1'", "generate --checkpoint 'a model' --session 's 1'"),
    ],
)
def test_a_command_ends_with_the_next_one(program: Program, workdir: Path, arguments: str, command: str) -> None:
    result = program(*shlex.split(arguments), "--checkpoint", "a model", cwd=workdir)
    assert result.code == 0, result.err
    assert result.err.endswith(f" with: memtx {command}\n"), (
        "the report on stdout is the same with and without a session"
    )


def test_data_is_followed_by_the_next_command_on_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda value=is_terminal: value)
        options.print_next_command("Serve it with", "serve", "--checkpoint", "a b", is_data=True)
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.endswith(" serve --checkpoint 'a b'\n") == is_terminal


def test_convert_and_evaluate_end_with_the_next_command(program: Program, workdir: Path) -> None:
    result = program("convert", "a model", "the copy", cwd=workdir)
    assert result.out.endswith("Serve it with: memtx serve --checkpoint 'the copy'\n"), result
    evaluate = ("evaluate", "--checkpoint", "a model", "--task", "needle", "--distances", "300", "--num-samples", "1")
    result = program(*evaluate, "--num-depths", "2", "--haystack", "a book.txt", cwd=workdir)
    words = shlex.split(result.out.rstrip().splitlines()[-1].partition(" with: ")[2])
    assert words == ["memtx", *evaluate, "--num-depths", "2", "--haystack", "a book.txt", "--plot", "needle.png"]


@pytest.mark.parametrize(
    ("script", "program_words"),
    [
        ("memtx", ["memtx"]),
        ("/nowhere/bin/memtx", ["memtx"]),
        (str(HOME / "scripts" / "setup.sh"), [str(HOME / "scripts" / "setup.sh")]),
    ],
)
def test_the_program_is_named_as_it_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, script: str, program_words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    assert shlex.split(options.command_line("fit", "--run_dir", "a b")) == [*program_words, "fit", "--run_dir", "a b"]
    monkeypatch.setattr(sys, "argv", [str(HOME / "memtx" / "__main__.py")])
    words = shlex.split(options.command_line("fit"))
    assert words[1:] == ["-m", "memtx", "fit"]
    prefix = subprocess.run(
        [words[0], "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert prefix.stdout.strip() == sys.prefix, "the same interpreter"


@pytest.mark.parametrize("arguments", [(), ("--trainer.max_steps", "1"), ("--run_dir", "run")])
def test_fit_without_texts_explains_itself(program: Program, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = program("fit", *arguments, cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert "memtx fit --data.root FOLDER" in result.err
    assert "--config" in result.err
    assert not list(tmp_path.iterdir())


def test_the_device_defaults_to_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.Parser("memtx x", "")
    parser.add_model_options()
    arguments = parser.parse(["--checkpoint", "x"])
    assert arguments.device == "auto"

    def choose(accelerator: str | None, device: str = "auto") -> torch.device:
        best = None if accelerator is None else torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: best)
        result: torch.device = options.get_placement(argparse.Namespace(device=device, dtype=None))["device"]
        return result

    assert choose(None).type == "cpu"
    assert capsys.readouterr().err == ""
    # The meta device stands for an accelerator that is there but does not compute.
    assert choose("meta").type == "cpu"
    assert capsys.readouterr().err.startswith("memtx: meta cannot be used (")
    with pytest.raises(MemtxError, match=r"--device meta cannot be used: .* Use auto, or one of: cpu\."):
        choose(None, "meta")


def test_openmp_threads_spin_briefly_unless_the_environment_decides() -> None:
    environment: dict[str, str] = {}
    shorten_openmp_spin(environment)
    assert environment == {"GOMP_SPINCOUNT": "30000"}
    for name in OPENMP_WAIT_VARIABLES:
        environment = {name: "1"}
        shorten_openmp_spin(environment)
        assert environment == {name: "1"}


@pytest.mark.parametrize("name", [None, *OPENMP_WAIT_VARIABLES])
def test_a_command_sets_the_spin_before_torch_is_loaded(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys\nfrom memtx.cli.main import main\nassert 'torch' not in sys.modules\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n            print(os.environ.get('GOMP_SPINCOUNT'))\n            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\nmain(['generate', '--checkpoint', '.', '--prompt', 'a'])"
    )
    for variable in OPENMP_WAIT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    result = subprocess.run([sys.executable, "-uc", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == {None: "30000", "GOMP_SPINCOUNT": "7"}.get(name, "None"), result.stderr
