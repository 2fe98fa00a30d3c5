"""What a user can get wrong around fit, validate, test and predict: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.program import HOME, Done, Program
from tests.commands.runs import CONFIG, changed, renamed, write, write_books

INIT = ("model", "model", "init_args")
MEMORY = (*INIT, "memories", 0)


def files(at: Path) -> dict[str, bytes]:
    """Return every file under a folder, but not the caches, which are no result."""
    found = (path for path in at.rglob("*") if path.is_file() and "cache" not in path.relative_to(at).parts)
    return {str(path.relative_to(at)): path.read_bytes() for path in found}


def refused(done: Done, *said: str) -> None:
    assert done.code == 2, done
    assert done.err.startswith("memtx: error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err + done.out
    for part in said:
        assert part in done.err, done.err


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_books(tmp_path / "books")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "typo", "key", "meant"),
    [
        (("trainer",), "trianer", "trianer", "trainer"),
        (("run_dir",), "run_dri", "run_dri", "run_dir"),
        (("data", "batch_size"), "batch_sizes", "data.batch_sizes", "batch_size"),
        (("trainer", "max_steps"), "max_step", "trainer.max_step", "max_steps"),
        (("model", "optimizer"), "optimiser", "model.optimiser", "optimizer"),
        (("model", "model", "class_path"), "class_pth", "model.model.class_pth", "class_path"),
        (("model", "model", "init_args"), "init_arg", "model.model.init_arg", "init_args"),
        ((*INIT, "depth"), "deph", "model.model.init_args.deph", "depth"),
        ((*MEMORY, "init_args", "window"), "windw", "model.model.init_args.memories.0.init_args.windw", "window"),
        (("model", "optimizer", "init_args", "lr"), "lrr", "model.optimizer.init_args.lrr", "lr"),
        (
            ("model", "scheduler", "init_args", "warmup_steps"),
            "warmup_setps",
            "model.scheduler.init_args.warmup_setps",
            "warmup_steps",
        ),
    ],
)
def test_a_mistyped_key_is_named_with_its_file_and_the_nearest(
    program: Program, place: Path, path: tuple[str | int, ...], typo: str, key: str, meant: str
) -> None:
    config = renamed(path, typo)
    if typo == "class_pth":
        # With no class at all the parser decides; with both it is a stray key.
        config["model"]["model"]["class_path"] = CONFIG["model"]["model"]["class_path"]
    write(place, config)
    before = files(place)
    refused(program("fit", "--config", "c.yaml", cwd=place), "'c.yaml'", f"'{key}'", f"Did you mean '{meant}'?")
    assert files(place) == before


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        # A class that is not there.
        ((*MEMORY, "class_path"), "memtx.CompresedMemory", "Did you mean 'CompressedMemory'?"),
        ((*MEMORY, "class_path"), "memtx.memry.none.NoMemory", "Did you mean 'memory'?"),
        ((*MEMORY, "class_path"), "nowhere_at_all.Mine", "'nowhere_at_all'"),
        (("model", "model", "class_path"), "memtx.MemoryTransfomer", "Did you mean 'MemoryTransformer'?"),
        ((*MEMORY, "init_args", "compression"), "memtx.memory.compression.MeanPoolin", "Did you mean 'MeanPooling'?"),
        (("model", "optimizer", "class_path"), "torch.optim.AdamWW", "Did you mean 'AdamW'?"),
        # A value of another type.
        (("data", "batch_size"), "many", "'data.batch_size' is many, expected int."),
        ((*INIT, "depth"), "two", "'model.model.init_args.depth' is two, expected int."),
        ((*MEMORY, "init_args", "window"), "big", "init_args.window' is big, expected int."),
        (("model", "optimizer", "init_args", "lr"), "fast", "init_args.lr' is fast, expected float"),
        (("trainer", "precision"), "bf17", "'trainer.precision' is bf17, expected"),
        (("trainer", "callbacks"), [{"class_path": "LearningRateMonitorr"}], "trainer.callbacks"),
        # A value out of its range, noticed by the part itself.
        ((*MEMORY, "init_args", "window"), 0, "window is 0"),
        ((*MEMORY, "init_args", "compression_rate"), 0, "compression_rate is 0"),
        ((*INIT, "heads"), 3, "Change dim or heads"),
        ((*INIT, "dropout"), 1.5, "dropout is 1.5"),
        ((*INIT, "memories"), [], "0 memories for 1 layers"),
        (("data", "batch_size"), 0, "batch_size is 0, expected at least 1"),
        (("data", "segment_length"), 0, "segment_length is 0"),
        (("seed_everything",), -3, "seed_everything is -3, expected 0 to 4294967295"),
        (("data", "root"), None, "Give the folder that holds them with --data.root PATH"),
        (("data", "root"), "no/such", "'no/such' does not exist"),
        (("model", "optimizer", "init_args", "lr"), -1.0, "Invalid learning rate: -1.0"),
        (("trainer", "accelerator"), "gpuu", "accelerator='gpuu'"),
        (("trainer", "strategy"), "ddpp", "ddpp"),
        (("model", "segment_length"), 8, "'model.segment_length' follows from 'data.segment_length'"),
        # Another program's function is no part.
        (MEMORY, {"class_path": "os.system"}, "'os.system', which belongs to Python itself"),
        (MEMORY, {"class_path": "torch.os.system"}, "'torch.os.system', which"),
        (MEMORY, {"class_path": "memtx.memory.none.deeper.NoMemory"}, "there is no 'memtx.memory.none.deeper'"),
    ],
)
def test_a_wrong_value_is_one_line(
    program: Program, place: Path, path: tuple[str | int, ...], value: Any, said: str
) -> None:
    write(place, changed(path, value))
    before = files(place)
    refused(program("fit", "--config", "c.yaml", cwd=place), said)
    assert files(place) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data: [1\nrun_dir: 2\n", "line 2"),
        (b"data:\n\tbatch_size: 1\n", "line 2"),
        (b"- a\n- b\n", "holds a list"),
        (b"", "holds nothing"),
        (b"run_dir: \xff\n", "not UTF-8: invalid start byte at byte 9"),
    ],
)
def test_a_config_that_is_no_config(program: Program, place: Path, content: bytes, said: str) -> None:
    (place / "c.yaml").write_bytes(content)
    refused(program("fit", "--config", "c.yaml", cwd=place), "c.yaml'", said)


def test_a_config_that_is_not_there(program: Program, place: Path) -> None:
    write(place)
    refused(program("fit", "--config", "cc.yaml", cwd=place), "'cc.yaml' does not exist", "Did you mean 'c.yaml'?")
    refused(program("fit", "--config=books", cwd=place), "'books' cannot be read")
    refused(program("fit", "--config", cwd=place), "--config")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--data.rot=x", "Did you mean '--data.root'?"),
        ("--trainer.max_stepss=3", "Did you mean '--trainer.max_steps'?"),
        ("--model.model.init_args.dept=2", "Did you mean 'depth'?"),
        ("--trainer.max_steps=lots", "'trainer.max_steps' is lots, expected int."),
        ("--ckpt_path=no.ckpt", "'no.ckpt' does not exist"),
        ("--run_dir=c.yaml", "'c.yaml' is a file, expected a folder"),
        ("stray", "stray"),
    ],
)
def test_a_wrong_argument_is_one_line(program: Program, place: Path, argument: str, said: str) -> None:
    write(place)
    before = files(place)
    refused(program("fit", "--config", "c.yaml", argument, cwd=place), said)
    assert files(place) == before


def test_books_that_cannot_be_read(program: Program, place: Path) -> None:
    write(place)
    fit = ("fit", "--config", "c.yaml", "--data.root", "given")
    (place / "given").mkdir()
    refused(program(*fit, cwd=place), "'given' holds no text", "PG-19", "--data.root")
    (place / "given" / "train").mkdir()
    refused(program(*fit, cwd=place), "given")
    book = place / "given" / "train" / "a.txt"
    book.write_bytes(b"")
    refused(program(*fit, cwd=place), "a.txt' is empty")
    book.write_bytes(b"abc" * 50 + b"\xff and more")
    refused(program(*fit, cwd=place), "a.txt' is not UTF-8", "150")
    assert not (place / "run").exists()


def test_tokens_that_no_tokenizer_makes_leave_no_run(program: Program, place: Path) -> None:
    """They are noticed when they are read: training has begun, and no step is done."""
    write(place)
    assert program("prepare", "books", "--output-dir", "tokens", "--num-workers", "1", cwd=place).code == 0
    for shard in (place / "tokens" / "train").glob("*.bin"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    before = files(place)
    fit = ("fit", "--config", "c.yaml", "--data.root", "tokens", "--trainer.limit_val_batches", "1")
    refused(program(*fit, cwd=place), "is damaged: it holds token 65535 of 257", "Prepare the data again")
    assert files(place) == before


def test_one_line_of_megabytes_is_a_book(program: Program, place: Path) -> None:
    (place / "line.txt").write_bytes(b"word " * 1_000_000)
    write(place)
    done = program("fit", "--config", "c.yaml", "--data.root", "line.txt", "--trainer.limit_val_batches=1", cwd=place)
    assert done.code == 0, done.err
    assert (place / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_checkpoint_that_cannot_be_used(program: Program, place: Path) -> None:
    write(place)
    assert program("fit", "--config", "c.yaml", cwd=place).code == 0
    last = place / "run" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    (place / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (place / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, place / "foreign.ckpt")
    write(place, changed((*INIT, "dim"), 32), "other.yaml")
    before = files(place)
    for command, run in (("fit", "new"), ("test", "run")):
        base = (command, "--config", "c.yaml", "--run_dir", run, "--ckpt_path")
        refused(program(*base, "cut.ckpt", cwd=place), "'cut.ckpt' is not a whole checkpoint")
        refused(program(*base, "foreign.ckpt", cwd=place), "'foreign.ckpt'", "something else")
        other = (command, "--config", "other.yaml", "--run_dir", run, "--ckpt_path", str(last))
        refused(program(*other, cwd=place), "last.ckpt'", "another model", "dim")
    refused(
        program("validate", "--run_dir", "run", "--ckpt_path", "empty.ckpt", cwd=place), "'empty.ckpt' is not a whole"
    )
    refused(program("predict", "--run_dir", "run", "--ckpt_path", "none.ckpt", cwd=place), "'none.ckpt' does not exist")
    refused(program("fit", "--config", "c.yaml", cwd=place), "'run' already holds a run", "--ckpt_path last")
    refused(program("test", "--run_dir", "nothing", cwd=place), "'nothing' holds no checkpoint")
    assert files(place) == before


def test_the_installed_script_says_the_same(place: Path) -> None:
    write(place, renamed(("data", "batch_size"), "batch_sizes"))
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    command = [sys.executable, "-m", "memtx", "fit", "--config", "c.yaml"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), "'data.batch_sizes'", "Did you mean 'batch_size'?")


def test_a_traceback_can_be_asked_for(program: Program, place: Path) -> None:
    write(place, changed(("data", "batch_size"), 0))
    done = program("fit", "--config", "c.yaml", "--traceback", cwd=place)
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("memtx: error: batch_size is 0")
