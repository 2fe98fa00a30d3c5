from __future__ import annotations

from pathlib import Path

import pytest

from memtx.cli.main import main
from tests.commands.tiny import BOOK, pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pretrained(tmp_path_factory.mktemp("model")))


def generate(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capfdbinary.readouterr().out.decode()


def test_seeds_and_greedy_are_deterministic(model: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    base = ("--checkpoint", model, "--prompt", "It was", "--max-tokens", "30")
    assert generate(capfdbinary, *base, "--seed", "1") == generate(capfdbinary, *base, "--seed", "1")
    assert generate(capfdbinary, *base, "--seed", "1") != generate(capfdbinary, *base, "--seed", "2")
    greedy = generate(capfdbinary, *base, "--greedy", "--seed", "1")
    assert greedy == generate(capfdbinary, *base, "--temperature", "0") == generate(capfdbinary, *base, "--top-k", "1")
    assert generate(capfdbinary, *base[:-1], "0") == "\n"


def test_a_prompt_file_equals_the_prompt(model: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "p.txt").write_text(BOOK[:300], encoding="utf-8")
    base = ("--checkpoint", model, "--max-tokens", "20")
    from_file = generate(capfdbinary, *base, "--prompt-file", str(tmp_path / "p.txt"))
    assert from_file == generate(capfdbinary, *base, "--prompt", BOOK[:300], "--segment-length", "11")


def test_generation_continues_from_a_read_session(
    model: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    book, session = tmp_path / "book.txt", tmp_path / "s"
    book.write_text(BOOK[:900], encoding="utf-8")
    assert main(["read", str(book), "--checkpoint", model, "--session", str(session), "--json"]) == 0
    content = session.read_bytes()
    capfdbinary.readouterr()
    base = ("--checkpoint", model, "--max-tokens", "25", "--greedy")
    text = generate(capfdbinary, *base, "--session", str(session), "--prompt", " And")
    assert text == generate(capfdbinary, *base, "--prompt", BOOK[:900] + " And")
    assert session.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--max-tokens", "-3"], "max_tokens is -3"),
        (["--prompt", "a", "--max-tokens", "many"], "invalid int value"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--device", "nonsense"], "--device nonsense"),
        (["--prompt", "a", "--tempereture", "1"], "Did you mean '--temperature'?"),
        (["--prompt-file", "/no/such/file"], "'/no/such/file' does not exist"),
        (["--prompt", "a", "--session", "/no/such/session"], "'/no/such/session' does not exist"),
        ([], "no text to continue"),
    ],
)
def test_errors_are_one_line(
    model: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["generate", "--checkpoint", model, *arguments])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert code == 2
    assert expected in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
