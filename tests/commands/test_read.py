from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memtx.cli import read as command
from memtx.cli.main import main
from memtx.inference.reader import StreamReader
from memtx.word_measure import MAX_WORD_PERPLEXITY
from tests.commands.tiny import BOOK, pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pretrained(tmp_path_factory.mktemp("model")))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK.encode())
    return path


def read_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["read", *arguments, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1
    totals: dict[str, Any] = json.loads(output.out)
    return totals


SAME = ("nll", "tokens", "words", "bytes", "bits_per_byte", "word_perplexity")


def test_json_adds_up(model: str, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    totals = read_json(capsys, str(book), "--checkpoint", model)
    size = len(BOOK.encode())
    assert (totals["tokens"], totals["bytes"], totals["words"]) == (size, size, len(BOOK.split()))
    assert totals["bits_per_byte"] == pytest.approx(totals["nll"] / math.log(2) / size)
    assert totals["bits_per_character"] == pytest.approx(totals["nll"] / math.log(2) / len(BOOK))
    assert math.exp(totals["nll"] / totals["words"]) > MAX_WORD_PERPLEXITY  # The model is not trained.
    assert totals["word_perplexity"] is None
    assert min(totals[name] for name in ("tokens_per_second", "state_bytes", "peak_memory_bytes")) > 0


def test_the_totals_do_not_depend_on_chunks_and_segments(
    model: str, book: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = read_json(capsys, str(book), "--checkpoint", model)
    # Chunks of 7 bytes cut characters.
    monkeypatch.setattr(command, "CHUNK_BYTES", 7)
    chunked = read_json(capsys, str(book), "--checkpoint", model)
    assert [complete[name] for name in SAME] == [chunked[name] for name in SAME]
    other = read_json(capsys, str(book), "--checkpoint", model, "--segment-length", "100")
    # Only the order of float32 sums differs.
    assert other["nll"] == pytest.approx(complete["nll"], rel=1e-5)


def test_the_report_has_a_line_per_chapter(model: str, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", str(book), "--checkpoint", model, "--report-every", "1000"]) == 0
    output = capsys.readouterr().out
    assert [line.split("  ")[0].strip() for line in output.splitlines() if line.startswith("CHAPTER")] == [
        "CHAPTER I",
        "CHAPTER II",
        "CHAPTER III",
    ]
    assert "tokens 1,000-2,000" in output
    assert f"total: {len(BOOK.encode()):,} tokens" in output


def test_plot_and_session_are_written(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, session = tmp_path / "p.png", tmp_path / "s"
    first = read_json(capsys, str(book), "--checkpoint", model, "--plot", str(plot), "--session", str(session))
    assert plot.read_bytes()[:4] == b"\x89PNG"
    again = read_json(capsys, str(book), "--checkpoint", model, "--session", str(session))
    assert [first[name] for name in SAME] == [again[name] for name in SAME]


def test_the_umask_applies_to_a_session(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = tmp_path / "s"
    before = os.umask(0o027)
    try:
        read_json(capsys, str(book), "--checkpoint", model, "--session", str(session))
    finally:
        os.umask(before)
    assert session.stat().st_mode & 0o777 == 0o640


def test_a_session_continues_with_a_book_that_grew(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = str(tmp_path / "s")
    book.write_bytes(BOOK.encode()[:1234])
    read_json(capsys, str(book), "--checkpoint", model, "--session", session)
    book.write_bytes(BOOK.encode())
    grown = read_json(capsys, str(book), "--checkpoint", model, "--session", session)
    complete = read_json(capsys, str(book), "--checkpoint", model)
    assert [grown[name] for name in SAME] == [complete[name] for name in SAME]


@pytest.mark.parametrize("chunk", [301, command.CHUNK_BYTES])
def test_an_interrupted_and_resumed_reading_equals_a_whole_one(
    chunk: int,
    model: str,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, plots = tmp_path / "s", (tmp_path / "a.png", tmp_path / "b.png")
    base = ["read", str(book), "--checkpoint", model, "--segment-length", "64", "--report-every", "500"]
    assert main([*base, "--plot", str(plots[0])]) == 0
    complete = capsys.readouterr().out
    monkeypatch.setattr(command, "CHUNK_BYTES", chunk)
    score = StreamReader._score

    def interrupted(self: StreamReader, *arguments: Any) -> Any:
        if self.totals.num_tokens == 64 * 17:
            os.kill(os.getpid(), signal.SIGINT)
        return score(self, *arguments)

    monkeypatch.setattr(StreamReader, "_score", interrupted)
    assert main([*base, "--session", str(session)]) == 130
    first = capsys.readouterr()
    assert "run the same command to resume" in first.err
    assert len(first.out.splitlines()) == 4  # header, CHAPTER I and two intervals; the rest was not read
    monkeypatch.setattr(StreamReader, "_score", score)
    assert main([*base, "--session", str(session), "--plot", str(plots[1])]) == 0
    rest = capsys.readouterr().out

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("part", "  speed", "  state"))]

    assert lines(first.out) + lines(rest) == lines(complete)
    assert plots[0].read_bytes() == plots[1].read_bytes()


def test_an_interrupt_without_a_session_saves_nothing(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = StreamReader.feed

    def interrupted(self: StreamReader, text: str | bytes) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        yield from feed(self, text)

    monkeypatch.setattr(StreamReader, "feed", interrupted)
    assert main(["read", str(book), "--checkpoint", model, "--json"]) == 130
    assert capsys.readouterr().out == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def read_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        code = main(["read", *arguments])
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("\n") == 1
    assert output.out == ""
    return output.err


def test_an_invalid_book_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = tmp_path / "s"
    options = ("--checkpoint", model, "--session", str(session))
    assert "does not exist" in read_error(capsys, str(tmp_path / "none.txt"), *options)
    assert "is a folder" in read_error(capsys, str(tmp_path), *options)
    path = tmp_path / "book.txt"
    path.write_bytes(b"")
    assert "is empty" in read_error(capsys, str(path), *options)
    path.write_bytes("Caf\xe9 au lait".encode("latin-1"))
    error = read_error(capsys, str(path), *options)
    assert "book.txt" in error
    assert "at byte offset 3" in error
    path.write_bytes("Café".encode()[:-1])
    assert "at byte offset 3" in read_error(capsys, str(path), *options)
    assert not session.exists()


def test_an_invalid_checkpoint_is_one_line(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert "does not exist" in read_error(capsys, str(book), "--checkpoint", str(tmp_path / "none.ckpt"))
    assert "not a valid checkpoint" in read_error(capsys, str(book), "--checkpoint", str(book))
    broken = pretrained(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "not a valid safetensors" in read_error(capsys, str(book), "--checkpoint", str(broken))


def test_an_invalid_session_is_one_line_and_stays(
    model: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = tmp_path / "s"
    options = (str(book), "--session", str(session), "--checkpoint")
    read_json(capsys, *options, model)
    good = session.read_bytes()
    assert "another model" in read_error(capsys, *options, str(pretrained(tmp_path / "other", seed=1)))
    book.write_bytes(b"Another book altogether." + BOOK.encode())
    assert "belongs to another text" in read_error(capsys, *options, model)
    assert session.read_bytes() == good
    session.write_bytes(good[:-1])
    assert "not a valid safetensors" in read_error(capsys, *options, model)


def test_wrong_options_are_one_line(model: str, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = (str(book), "--checkpoint", model)
    assert "--segment-length: must be at least 1, got 0" in read_error(capsys, *base, "--segment-length", "0")
    assert "--report-every: must be at least 0, got -1" in read_error(capsys, *base, "--report-every", "-1")
    assert "Did you mean '--session'?" in read_error(capsys, *base, "--sesion", "x")
    assert "--plot: the folder '/no/such/folder' does not exist" in read_error(
        capsys, *base, "--plot", "/no/such/folder/a.png"
    )
    assert "required: --checkpoint" in read_error(capsys, str(book))


def test_a_real_book_is_read(books: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "real.txt"
    path.write_bytes(sorted(books.glob("*/*.txt"))[0].read_bytes()[:20_000].decode(errors="ignore").encode())
    totals = read_json(capsys, str(path), "--checkpoint", model)
    assert totals["words"] == len(path.read_text(encoding="utf-8").split())


def test_a_byte_order_mark_is_no_text_and_nul_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for mark in ("", "\ufeff"):
        (tmp_path / "book.txt").write_text(mark + "A text of some words.\n" * 40, encoding="utf-8")
        assert main(["read", str(tmp_path / "book.txt"), "--checkpoint", model, "--json"]) == 0
        output = json.loads(capsys.readouterr().out)
        # Time and the process's peak memory are of the run, not of the text.
        measured = {"seconds", "tokens_per_second", "peak_memory_bytes"}
        outputs.append({name: value for name, value in output.items() if name not in measured})
    assert outputs[0] == outputs[1]
    (tmp_path / "book.txt").write_bytes("A text.\n".encode("utf-16-le"))
    assert "holds a NUL byte at byte offset 1" in read_error(capsys, str(tmp_path / "book.txt"), "--checkpoint", model)
