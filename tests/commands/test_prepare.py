"""`memtx prepare`: training on its output, and the same output after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.program import HOME, Program
from tests.commands.runs import changed, write, write_books
from tests.commands.test_mistakes import refused

ENVIRONMENT = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_prepared_and_trained_on(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    result = program(
        "prepare", "books", "--output-dir", "tokens", "--tokenizer", "300", "--num-workers", "1", cwd=tmp_path
    )
    assert result.code == 0, result.err
    assert result.out.splitlines()[1].split()[:2] == ["train", "3"]
    assert "memtx fit --data.root tokens" in result.out
    write(tmp_path, changed(("data", "root"), "tokens"))
    (tmp_path / "books").rename(tmp_path / "elsewhere")
    result = program("fit", "--config", "c.yaml", cwd=tmp_path)
    assert result.code == 0, result.err
    assert not (tmp_path / "cache").exists()
    assert program("test", "--run_dir", "run", cwd=tmp_path).code == 0
    again = program("prepare", "elsewhere", "--output-dir", "other", "--json", cwd=tmp_path)
    assert json.loads(again.out)["splits"]["test"]["documents"] == 3


def test_errors_are_one_line(program: Program, tmp_path: Path) -> None:
    write_books(tmp_path / "books")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = files(tmp_path)
    for arguments, expected in (
        (("nowhere", "--output-dir", "o"), "'nowhere' does not exist"),
        (("books", "--output-dir", "o", "--tokenizer", "none.json"), "'none.json' does not exist"),
        (("books", "--output-dir", "o", "--tokenizer", "20"), "vocab_size is 20"),
        (("books", "--output-dir", "o", "--num-workers", "0"), "--num-workers: must be at least 1, got 0"),
        (("books", "--output-dir", "o", "--test-fraction", "2"), "test_fraction is 2.0"),
        (("books", "--output-dir", "o", "--dataset-config", "x"), "Add --hf-dataset"),
        (("books", "books", "--output-dir", "o", "--hf-dataset"), "takes one source"),
        (("books", "--output-dir", "full"), "'full' exists and is no prepared folder"),
        (("books", "--output-dir", "full/x/o"), "cannot be written to"),
    ):
        refused(program("prepare", *arguments, cwd=tmp_path), expected)
        assert {name for name in files(tmp_path) if not name.endswith(".lock")} == set(before), arguments
    result = program("prepare", "books", "--output-dri", "o", cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "Did you mean '--output-dir'?" in result.err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 12 MB in 12 files, so that a test on a slow machine still finds unread ones."""
    root = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 9))) for _ in range(500)]
    for number in range(12):
        (root / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": " ".join(rng.choices(words, k=800))}) + "\n" for _ in range(225))
        )
    return root


def start(corpus: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "memtx", "prepare", str(corpus), "--output-dir", str(out), "--num-workers", "2"]
    # In its own process group, so that Ctrl-C reaches all of it as in a terminal.
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def test_kills_do_not_change_the_output(corpus: Path, tmp_path: Path) -> None:
    assert start(corpus, tmp_path / "whole").wait(120) == 0
    rng = random.Random(1)
    out, building = tmp_path / "killed" / "out", tmp_path / "killed" / ".out.building"
    for kill in range(5):
        process = start(corpus, out)
        # Until one more shard is complete, and then anywhere in the next one.
        while len(list(building.glob("train/*.json"))) <= kill:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        assert not out.exists()
    assert start(corpus, out).wait(120) == 0
    assert files(out) == files(tmp_path / "whole")
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")] == ["out"]


def test_ctrl_c_keeps_finished_shards(corpus: Path, tmp_path: Path) -> None:
    out, building = tmp_path / "out", tmp_path / ".out.building"
    process = start(corpus, out)
    while not list(building.glob("train/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().strip() == "memtx: interrupted: finished shards are kept; run the same command to resume"
    assert not out.exists()
    inodes = {path.name: path.stat().st_ino for path in building.glob("train/*.json")}
    assert inodes
    assert start(corpus, out).wait(120) == 0
    assert {name: (out / "train" / name).stat().st_ino for name in inodes} == inodes


def test_lines_say_what_is_left_out_and_cut(program: Program, tmp_path: Path) -> None:
    for name in ("train.txt", "train/more.md", "notes.txt", "README.md", "LICENSE", ".DS_Store", "a.pdf"):
        (tmp_path / "books [1]" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books [1]" / name).write_text("Some words to read. " * 40)
    result = program("prepare", "books [1]", "--output-dir", "tokens", "--num-workers", "1", cwd=tmp_path)
    assert result.code == 0, result.err
    (note,) = (line for line in result.out.splitlines() if line.startswith("'books [1]': not read: "))
    reasons = ["1 hidden (.DS_Store)", "1 with other endings (a.pdf)", "1 in no split (notes.txt)"]
    for reason in (*reasons, "2 README, licence or metadata (LICENSE, README.md)"):
        assert reason in note
    assert "'books [1]' has no validation split. Name a file or folder train, validation" in result.out
    write(tmp_path, changed(("data", "root"), "books [1]"))
    result = program("fit", "--config", "c.yaml", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.err.count("1 in no split (notes.txt)") == 1
    assert result.err.count("has no validation split, so there is no validation") == 1
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("text\nSome words.\n")
    result = program("fit", "--config", "c.yaml", "--data.root", "rows", "--run_dir", "other", cwd=tmp_path)
    refused(result, "'rows' holds tables of texts", "memtx prepare rows --output-dir")
