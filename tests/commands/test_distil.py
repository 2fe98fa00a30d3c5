"""The distilling configs from teacher to student at a tiny size, and `memtx distil report` beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.models.encoder import Encoder
from tests.commands import runs
from tests.commands.program import HOME, Program
from tests.tasks import folder

SHORT = [
    "--trainer.max_steps=2",
    "--trainer.max_epochs=-1",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]
TEACHER = "--model.distillation.init_args.teacher=teacher"


def fit(program: Program, at: Path, config: str, run: str, *options: str) -> str:
    done = program("fit", "--config", str(HOME / "configs" / config), "--run_dir", run, *SHORT, *options, at=at)
    assert done.code == 0, done.err
    return (at / run / "metrics.csv").read_text().partition("\n")[0]


def books(at: Path) -> list[str]:
    if not (at / "books").exists():
        runs.write_books(at / "books")
    return ["--data.root=books", "--data.cache_dir=cache", "--data.num_workers=1", "--trainer.val_check_interval=2"]


def decoder(depth: int) -> list[str]:
    sizes = {"dim": 16, "depth": depth, "heads": 2, "feed_forward.init_args.hidden_dim": 32}
    return [f"--model.model.init_args.{name}={value}" for name, value in sizes.items()]


WINDOW = """--model.model.init_args.memories=[{class_path: memtx.RecurrentMemory, init_args: {window: 64}}]"""


def test_a_long_teacher_teaches_a_memory(program: Program, tmp_path: Path) -> None:
    common = [*books(tmp_path), "--data.batch_size=2", "--data.segment_length=16"]
    fit(program, tmp_path, "pg19-mini.yaml", "teacher", *common, *decoder(4), WINDOW)
    named = fit(program, tmp_path, "long-to-memory.yaml", "student", *common, *decoder(2), TEACHER)
    assert {"train_soft_targets", "train_hard_labels", "train_hidden_cosine"} <= set(named.split(","))
    asked = [
        "distil",
        "report",
        "--teacher",
        "teacher",
        "--student",
        "student",
        "--data",
        "books",
        "--max-length",
        "128",
    ]
    done = program(
        *asked,
        "--segment-length=16",
        "--num-timed=2",
        "--min-position=16",
        "--plot=a.png",
        "--json=a.json",
        at=tmp_path,
    )
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "a.json").read_text())
    (student,) = found["students"]
    assert 0.3 < student["size_reduction"] < 0.6
    assert student["metric"] == "bits_per_byte"
    assert student["score_retention"] == pytest.approx(found["teacher"]["score"] / student["score"])
    assert f"{student['num_parameters']:,}" in done.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # The student is a run like any other.
    read = program("read", "books/test/0.txt", "--checkpoint", "student", "--json", at=tmp_path)
    assert read.code == 0, read.err


def test_a_tasks_teacher_teaches_a_tiny_student(program: Program, tmp_path: Path) -> None:
    root = [f"--data.root={folder(tmp_path / 'data', 'tagging', 8)}"]
    small = ["--model.backbone.init_args.dim=16", "--model.backbone.init_args.heads=4"]
    fit(program, tmp_path, "conll2000.yaml", "teacher", *root, *small)
    named = fit(program, tmp_path, "tinybert-task.yaml", "student", *root, "--model.backbone.init_args.dim=8", TEACHER)
    assert {"train_embedding_mse", "train_attention_mse", "train_hidden_mse", "train_soft_targets"} <= set(
        named.split(",")
    )
    asked = ["distil", "report", "--teacher", "teacher", "--student", "student", "--data", "data", "--json", "-"]
    done = program(*asked, "--num-timed=2", at=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["teacher"]["metric"] == "f1"
    assert found["students"][0]["num_parameters"] < found["teacher"]["num_parameters"]
    said = program("predict", "--checkpoint", "student", "--text", "captain Ahab swims", at=tmp_path)
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("name", "student", "losses"),
    [
        ("distilbert", {"dim": 16, "depth": 1}, {"soft_targets", "hard_labels", "hidden_cosine"}),
        ("tinybert-general", {"dim": 8, "depth": 1}, {"embedding_mse", "attention_mse", "hidden_mse"}),
    ],
)
def test_an_encoder_teaches_another(
    program: Program, tmp_path: Path, name: str, student: dict[str, Any], losses: set[str]
) -> None:
    common = books(tmp_path)
    torch.manual_seed(0)
    Encoder(301, 16, 2, 2, 32).save_pretrained(tmp_path / "teacher")
    sizes = {**student, "heads": 2, "hidden_dim": 32}
    options = [f"--model.model.init_args.{key}={value}" for key, value in sizes.items()]
    named = fit(
        program, tmp_path, f"{name}.yaml", "student", *common, *options, TEACHER, "--data.batch_size=2",
        "--data.segment_length=16",
        "--data.tokenizer.init_args.vocab_size=300", "--trainer.accumulate_grad_batches=1",
        "--trainer.precision=32-true",
    )  # fmt: skip
    assert {f"train_{one}" for one in losses} <= set(named.split(","))


@pytest.mark.parametrize("config", ["distilbert", "tinybert-general", "tinybert-task", "long-to-memory"])
def test_without_a_teacher_it_says_how_to_name_one(program: Program, tmp_path: Path, config: str) -> None:
    root = folder(tmp_path / "data", "tagging", 8) if config == "tinybert-task" else "embedded"
    asked = ["fit", "--config", str(HOME / "configs" / f"{config}.yaml"), "--data.root", str(root)]
    small = [] if config == "tinybert-task" else ["--data.cache_dir=cache", "--data.num_workers=1"]
    if config in ("distilbert", "tinybert-general"):
        small += ["--model.model.init_args.dim=24", "--data.tokenizer.init_args.vocab_size=300"]
    done = program(*asked, *small, "--trainer.accelerator=cpu", at=tmp_path)
    assert done.code == 2
    assert "No teacher is given to be distilled. Add --model.distillation.init_args.teacher RUN" in done.err
    assert not (tmp_path / "runs" / config).exists()


def test_mistakes_are_one_line(program: Program, tmp_path: Path) -> None:
    books(tmp_path)
    runs.write(tmp_path)
    assert program("fit", "--config", "c.yaml", at=tmp_path).code == 0
    asked = ["distil", "report", "--teacher", "run", "--student", "run", "--data"]
    for given, said in (
        (["books", "--num-timed=0"], "--num-timed: must be at least 1, got 0"),
        (["books", "--min-position=99999"], "--min-position (99999) must be below --max-length (16384)"),
        (["books", "--plot=no/a.png"], "/no' does not exist"),
        (["nowhere"], "nowhere"),
    ):
        done = program(*asked, *given, at=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert said in done.err
    done = program("distil", "report", "--teacher", "run", "--student", "none", "--data", "books", at=tmp_path)
    assert done.code == 2
    assert "'none' does not exist" in done.err
