"""User errors of fit, validate, test and predict: one line, exit code 2, no partial files."""

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


def files(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder except the caches."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def refused(result: Done, *expected: str) -> None:
    assert result.code == 2, result
    assert result.err.startswith("memtx: error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in expected:
        assert part in result.err, result.err


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_books(tmp_path / "books")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "typo", "key", "closest"),
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
def test_a_mistyped_key_is_reported_with_its_file_and_the_closest_key(
    program: Program, workdir: Path, path: tuple[str | int, ...], typo: str, key: str, closest: str
) -> None:
    config = renamed(path, typo)
    if typo == "class_pth":
        # Without a class the parser decides; with both keys, the mistyped one is unknown.
        config["model"]["model"]["class_path"] = CONFIG["model"]["model"]["class_path"]
    write(workdir, config)
    before = files(workdir)
    refused(program("fit", "--config", "c.yaml", cwd=workdir), "'c.yaml'", f"'{key}'", f"Did you mean '{closest}'?")
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        # Classes that do not exist.
        ((*MEMORY, "class_path"), "memtx.CompresedMemory", "Did you mean 'CompressedMemory'?"),
        ((*MEMORY, "class_path"), "memtx.memry.none.NoMemory", "Did you mean 'memory'?"),
        ((*MEMORY, "class_path"), "nowhere_at_all.Mine", "'nowhere_at_all'"),
        (("model", "model", "class_path"), "memtx.MemoryTransfomer", "Did you mean 'MemoryTransformer'?"),
        ((*MEMORY, "init_args", "compression"), "memtx.memory.compression.MeanPoolin", "Did you mean 'MeanPooling'?"),
        (("model", "optimizer", "class_path"), "torch.optim.AdamWW", "Did you mean 'AdamW'?"),
        # Values of the wrong type.
        (("data", "batch_size"), "many", "'data.batch_size' is many, expected int."),
        ((*INIT, "depth"), "two", "'model.model.init_args.depth' is two, expected int."),
        ((*MEMORY, "init_args", "window"), "big", "init_args.window' is big, expected int."),
        (("model", "optimizer", "init_args", "lr"), "fast", "init_args.lr' is fast, expected float"),
        (("trainer", "precision"), "bf17", "'trainer.precision' is bf17, expected"),
        (("trainer", "callbacks"), [{"class_path": "LearningRateMonitorr"}], "trainer.callbacks"),
        # Values out of range, which the class itself checks.
        ((*MEMORY, "init_args", "window"), 0, "window is 0"),
        ((*MEMORY, "init_args", "compression_rate"), 0, "compression_rate is 0"),
        ((*INIT, "heads"), 3, "Change dim or heads"),
        ((*INIT, "dropout"), 1.5, "dropout is 1.5"),
        ((*INIT, "memories"), [], "0 memories for 1 layers"),
        (("data", "batch_size"), 0, "batch_size is 0, expected at least 1"),
        (("data", "segment_length"), 0, "segment_length is 0"),
        # Short names and wrong arguments deep inside lists; missing arguments and packages.
        (
            ("model", "optimizer"),
            "Adamm",
            "'model.optimizer' is 'Adamm', expected a class of Optimizer. Did you mean 'Adam'?",
        ),
        (("trainer", "callbacks"), [{"class_path": "EarlyStoping"}], "Did you mean 'EarlyStopping'?"),
        (
            ("trainer", "callbacks"),
            [{"class_path": "EarlyStopping"}],
            "'trainer.callbacks.0' (EarlyStopping) needs 'monitor'",
        ),
        (
            ("trainer", "callbacks"),
            [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss", "patience": "x"}}],
            "'trainer.callbacks.0.init_args.patience' is x, expected int.",
        ),
        ((*INIT, "memories", 0), {"class_path": "CompresedMemory"}, "init_args.memories.0' is 'CompresedMemory'"),
        ((*INIT, "memories"), "memtx.CompressedMemory", "expected list of"),
        (("trainer", "logger"), "WandLogger", "Did you mean 'WandbLogger'?"),
        (("trainer", "logger"), "no_such_package.Logger", "Install it: pip install no_such_package"),
        (("trainer", "limit_val_batches"), 1.5, "Change --trainer.limit_val_batches."),
        (("data",), "books-of-mine", "'data' is books-of-mine, expected a mapping."),
        (("fit",), {"data": {"root": "books"}}, "has its options under 'fit'"),
        (("verbose",), True, "'verbose' is an option of memtx validate only"),
        (("model_type",), "bert", "is the config of a model, not of training"),
        (("seed_everything",), -3, "seed_everything is -3, expected 0 to 4294967295"),
        (("data", "root"), None, "Give the folder that holds them with --data.root PATH"),
        (("data", "root"), "no/such", "'no/such' does not exist"),
        (("model", "optimizer", "init_args", "lr"), -1.0, "Invalid learning rate: -1.0"),
        (("trainer", "accelerator"), "gpuu", "accelerator='gpuu'"),
        (("trainer", "strategy"), "ddpp", "ddpp"),
        (("model", "segment_length"), 8, "'model.segment_length' follows from 'data.segment_length'"),
        # Functions of Python itself.
        (MEMORY, {"class_path": "os.system"}, "'os.system', which belongs to Python itself"),
        (MEMORY, {"class_path": "torch.os.system"}, "'torch.os.system', which"),
        (MEMORY, {"class_path": "memtx.memory.none.deeper.NoMemory"}, "there is no module 'memtx.memory.none.deeper'"),
    ],
)
def test_a_wrong_value_is_one_line(
    program: Program, workdir: Path, path: tuple[str | int, ...], value: Any, expected: str
) -> None:
    write(workdir, changed(path, value))
    before = files(workdir)
    refused(program("fit", "--config", "c.yaml", cwd=workdir), expected)
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: [1\nrun_dir: 2\n", "line 2"),
        (b"data:\n\tbatch_size: 1\n", "line 2"),
        (b"data:\n\tbatch_size: 1\n", "Indent with spaces"),
        (
            b"data: {root: a}\nrun_dir: x\ndata: {root: b}\n",
            "line 3, column 1: the key 'data' occurs twice, first in line 1",
        ),
        (b"data:\n  root: a\n  root: b\n", "the key 'root' occurs twice"),
        (b"- a\n- b\n", "holds a list"),
        (b"", "holds nothing"),
        (b"run_dir: \xff\n", "not UTF-8: byte 0xff at byte offset 9 (invalid start byte)"),
    ],
)
def test_an_invalid_config_is_one_line(program: Program, workdir: Path, content: bytes, expected: str) -> None:
    (workdir / "c.yaml").write_bytes(content)
    refused(program("fit", "--config", "c.yaml", cwd=workdir), "c.yaml'", expected)


def test_a_missing_config_is_one_line(program: Program, workdir: Path) -> None:
    write(workdir)
    refused(program("fit", "--config", "cc.yaml", cwd=workdir), "'cc.yaml' does not exist", "Did you mean 'c.yaml'?")
    refused(program("fit", "--config=books", cwd=workdir), "'books' cannot be read")
    refused(program("fit", "--config", cwd=workdir), "--config")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.rot=x", "Did you mean '--data.root'?"),
        ("--trainer.max_stepss=3", "Did you mean '--trainer.max_steps'?"),
        ("--model.model.init_args.dept=2", "Did you mean 'depth'?"),
        ("--trainer.max_steps=lots", "'trainer.max_steps' is lots, expected int."),
        ("--ckpt_path=no.ckpt", "'no.ckpt' does not exist"),
        ("--run_dir=c.yaml", "'c.yaml' is a file, expected a folder"),
        ("stray", "stray"),
        ("c.yaml", "Did you mean '--config c.yaml'?"),
        ("books", "Did you mean '--data.root books'?"),
        ("--optimizer=Adam", "Did you mean '--model.optimizer'?"),
        ("--batch_size=4", "Did you mean '--data.batch_size'?"),
        ("--batch-size=4", "Did you mean '--data.batch_size'?"),
        ("--lr=1", "Did you mean '--model.optimizer.lr'?"),
        ("--max_steps=1", "Did you mean '--trainer.max_steps'?"),
        ("--seed=1", "Did you mean '--seed_everything'?"),
        ("--trainer.precison=16", "Did you mean '--trainer.precision'?"),
        ("--trainer.precision=bf17", "Did you mean 'bf16'?"),
        (
            "--model.optimizer=AdamWW",
            "'model.optimizer' is 'AdamWW', expected a class of Optimizer. Did you mean 'AdamW'?",
        ),
        ("--model.optimizer=bitsandbytes_.Adam8bit", "Install it: pip install bitsandbytes_"),
        ("--model.optimizer.lrr=1", "there is no key 'model.optimizer.lrr' in AdamW. Did you mean 'lr'?"),
        ("--trainer.callbacks=EarlyStoping", "Did you mean 'EarlyStopping'?"),
        ("--trainer.callbacks+=EarlyStoping", "Did you mean 'EarlyStopping'?"),
        ("--trainer.callbacks=EarlyStopping", "'trainer.callbacks' (EarlyStopping) needs 'monitor'"),
        ("--model=MemoryTransformer", "names no config file"),
    ],
)
def test_a_wrong_argument_is_one_line(program: Program, workdir: Path, argument: str, expected: str) -> None:
    write(workdir)
    before = files(workdir)
    refused(program("fit", "--config", "c.yaml", argument, cwd=workdir), expected)
    assert files(workdir) == before


def test_invalid_texts_are_one_line(program: Program, workdir: Path) -> None:
    write(workdir)
    fit = ("fit", "--config", "c.yaml", "--data.root", "given")
    (workdir / "given").mkdir()
    refused(program(*fit, cwd=workdir), "'given' holds no text", "PG-19", "--data.root")
    (workdir / "given" / "train").mkdir()
    refused(program(*fit, cwd=workdir), "given")
    book = workdir / "given" / "train" / "a.txt"
    book.write_bytes(b"")
    refused(program(*fit, cwd=workdir), "a.txt' is empty")
    book.write_bytes(b"abc" * 50 + b"\xff and more")
    refused(program(*fit, cwd=workdir), "a.txt' is not UTF-8", "150")
    assert not (workdir / "run").exists()


def test_tokens_outside_the_vocabulary_leave_no_run(program: Program, workdir: Path) -> None:
    """The tokens are checked when they are read: the model is summarized, but no step is done."""
    write(workdir)
    assert program("prepare", "books", "--output-dir", "tokens", "--num-workers", "1", cwd=workdir).code == 0
    for shard in (workdir / "tokens" / "train").glob("*.bin"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    before = files(workdir)
    fit = ("fit", "--config", "c.yaml", "--data.root", "tokens", "--trainer.limit_val_batches", "1")
    result = program(*fit, cwd=workdir)
    summary, error = result.err[: result.err.find("memtx: ")], result.err[result.err.find("memtx: ") :]
    assert summary.startswith("  | Name"), result.err
    assert summary.endswith("Modules in eval mode\n"), result.err
    result = Done(result.code, result.out, error)
    refused(result, "is damaged: it holds token 65535 of 257", "Prepare the data again")
    assert files(workdir) == before
    refused(program(*fit, "--trainer.enable_model_summary", "false", cwd=workdir), "is damaged: it holds token 65535")


def test_a_line_of_megabytes_is_a_book(program: Program, workdir: Path) -> None:
    (workdir / "line.txt").write_bytes(b"word " * 1_000_000)
    write(workdir)
    result = program(
        "fit", "--config", "c.yaml", "--data.root", "line.txt", "--trainer.limit_val_batches=1", cwd=workdir
    )
    assert result.code == 0, result.err
    assert (workdir / "run" / "checkpoints" / "last.ckpt").exists()


def test_an_unusable_checkpoint_is_one_line(program: Program, workdir: Path) -> None:
    write(workdir)
    assert program("fit", "--config", "c.yaml", cwd=workdir).code == 0
    last = workdir / "run" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    (workdir / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (workdir / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}}, workdir / "foreign.ckpt")
    write(workdir, changed((*INIT, "dim"), 32), "other.yaml")
    before = files(workdir)
    for command, run in (("fit", "new"), ("test", "run")):
        base = (command, "--config", "c.yaml", "--run_dir", run, "--ckpt_path")
        refused(program(*base, "cut.ckpt", cwd=workdir), "'cut.ckpt' is not a valid checkpoint")
        refused(program(*base, "foreign.ckpt", cwd=workdir), "'foreign.ckpt'", "was not written by memtx")
        other = (command, "--config", "other.yaml", "--run_dir", run, "--ckpt_path", str(last))
        refused(program(*other, cwd=workdir), "last.ckpt'", "another model", "dim")
    refused(
        program("validate", "--run_dir", "run", "--ckpt_path", "empty.ckpt", cwd=workdir), "'empty.ckpt' is not a valid"
    )
    refused(
        program("predict", "--run_dir", "run", "--ckpt_path", "none.ckpt", cwd=workdir), "'none.ckpt' does not exist"
    )
    refused(program("fit", "--config", "c.yaml", cwd=workdir), "'run' already holds a run", "--ckpt_path last")
    refused(program("test", "--run_dir", "nothing", cwd=workdir), "'nothing' holds no checkpoint")
    assert files(workdir) == before


def test_an_option_holds_before_a_config_too(program: Program, workdir: Path) -> None:
    write(workdir)
    for config in (["--config", "c.yaml"], ["-c", "c.yaml"], ["--config=c.yaml"]):
        refused(program("fit", "--data.root", "nothing", *config, cwd=workdir), "'nothing' does not exist")


def test_the_module_reports_the_same_errors(workdir: Path) -> None:
    write(workdir, renamed(("data", "batch_size"), "batch_sizes"))
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    command = [sys.executable, "-m", "memtx", "fit", "--config", "c.yaml"]
    result = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)
    refused(Done(result.returncode, result.stdout, result.stderr), "'data.batch_sizes'", "Did you mean 'batch_size'?")


def test_the_traceback_option_prints_the_traceback(program: Program, workdir: Path) -> None:
    write(workdir, changed(("data", "batch_size"), 0))
    result = program("fit", "--config", "c.yaml", "--traceback", cwd=workdir)
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("memtx: error: batch_size is 0")
