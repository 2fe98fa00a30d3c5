"""The distillation configs with tiny models, and `memtx distil report` on them."""

from __future__ import annotations

import csv
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


def fit(program: Program, workdir: Path, config: str, run: str, *options: str) -> set[str]:
    """Train, and return the names of the logged metrics."""
    path = str(HOME / "configs" / config)
    result = program("fit", "--config", path, "--run_dir", run, *SHORT, *options, cwd=workdir)
    assert result.code == 0, result.err
    return set((workdir / run / "metrics.csv").read_text().partition("\n")[0].split(","))


def active_steps(run: Path, loss: str) -> list[int]:
    """Return the steps, from 0, whose logged loss counts."""
    with (run / "metrics.csv").open() as file:
        values = [row[f"train_{loss}"] for row in csv.DictReader(file) if row["train_loss"]]
    return [step for step, value in enumerate(values) if float(value or 0) > 0]


def books(workdir: Path) -> list[str]:
    if not (workdir / "books").exists():
        runs.write_books(workdir / "books")
    return ["--data.root=books", "--data.cache_dir=cache", "--data.num_workers=1", "--trainer.val_check_interval=2"]


def decoder(depth: int) -> list[str]:
    sizes = {"dim": 16, "depth": depth, "heads": 2, "feed_forward.init_args.hidden_dim": 32}
    return [f"--model.model.init_args.{name}={value}" for name, value in sizes.items()]


WINDOW = """--model.model.init_args.memories=[{class_path: memtx.RecurrentMemory, init_args: {window: 64}}]"""


def test_a_long_window_is_distilled_into_a_memory(program: Program, tmp_path: Path) -> None:
    common = [*books(tmp_path), "--data.batch_size=2", "--data.segment_length=16"]
    as_in_the_config = [
        "--data.tokenizer={class_path: memtx.data.tokenizers.ByteTokenizer}",
        "--model.model.init_args.output_memory=null",
    ]
    fit(program, tmp_path, "pg19-mini.yaml", "teacher", *common, *decoder(4), WINDOW, *as_in_the_config)
    metrics = fit(program, tmp_path, "long-to-memory.yaml", "student", *common, *decoder(2), TEACHER)
    assert {"train_soft_targets", "train_hard_labels", "train_hidden_cosine"} <= metrics
    command = ["distil", "report", "--teacher", "teacher", "--student", "student", "--data", "books"]
    options = ["--max-length=128", "--segment-length=16", "--num-timed=2", "--min-position=16"]
    result = program(*command, *options, "--plot=a.png", "--json=a.json", cwd=tmp_path)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "a.json").read_text())
    (student,) = report["students"]
    assert 0.3 < student["size_reduction"] < 0.6
    assert student["metric"] == "bits_per_byte"
    assert student["score_retention"] == pytest.approx(report["teacher"]["score"] / student["score"])
    assert f"{student['num_parameters']:,}" in result.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # The student is a run like any other.
    read = program("read", "books/test/0.txt", "--checkpoint", "student", "--json", cwd=tmp_path)
    assert read.code == 0, read.err


def test_a_task_model_is_distilled_into_a_smaller_one(program: Program, tmp_path: Path) -> None:
    root = [f"--data.root={folder(tmp_path / 'data', 'tagging', 8)}"]
    small = ["--model.backbone.init_args.dim=16", "--model.backbone.init_args.heads=4"]
    fit(program, tmp_path, "conll2000.yaml", "teacher", *root, *small)
    metrics = fit(
        program, tmp_path, "tinybert-task.yaml", "student", *root, "--model.backbone.init_args.dim=8", TEACHER,
        "--trainer.max_steps=10",
    )  # fmt: skip
    assert {"train_embedding_mse", "train_attention_mse", "train_hidden_mse", "train_soft_targets"} <= metrics
    # Intermediate layers first, then predictions (TinyBERT, Jiao et al. 2020, section 3); the phases overlap.
    for loss in ("embedding_mse", "attention_mse", "hidden_mse"):
        assert active_steps(tmp_path / "student", loss) == list(range(6)), loss
    assert active_steps(tmp_path / "student", "soft_targets") == list(range(4, 10))
    command = ["distil", "report", "--teacher", "teacher", "--student", "student", "--data", "data", "--json", "-"]
    result = program(*command, "--num-timed=2", cwd=tmp_path)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["teacher"]["metric"] == "f1"
    assert report["students"][0]["num_parameters"] < report["teacher"]["num_parameters"]
    result = program("predict", "--checkpoint", "student", "--text", "captain Ahab swims", cwd=tmp_path)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("name", "student", "losses"),
    [
        ("distilbert", {"dim": 16, "depth": 1}, {"soft_targets", "hard_labels", "hidden_cosine"}),
        ("tinybert-general", {"dim": 8, "depth": 1}, {"embedding_mse", "attention_mse", "hidden_mse"}),
    ],
)
def test_an_encoder_is_distilled_into_another(
    program: Program, tmp_path: Path, name: str, student: dict[str, Any], losses: set[str]
) -> None:
    common = books(tmp_path)
    torch.manual_seed(0)
    Encoder(301, 16, 2, 2, 32).save_pretrained(tmp_path / "teacher")
    sizes = {**student, "heads": 2, "hidden_dim": 32}
    options = [f"--model.model.init_args.{key}={value}" for key, value in sizes.items()]
    metrics = fit(
        program, tmp_path, f"{name}.yaml", "student", *common, *options, TEACHER, "--data.batch_size=2",
        "--data.segment_length=16",
        "--data.tokenizer.init_args.vocab_size=300", "--trainer.accumulate_grad_batches=1",
        "--trainer.precision=32-true",
    )  # fmt: skip
    assert {f"train_{name}" for name in losses} <= metrics


@pytest.mark.parametrize("config", ["distilbert", "tinybert-general", "tinybert-task", "long-to-memory"])
def test_a_missing_teacher_is_reported_with_its_option(program: Program, tmp_path: Path, config: str) -> None:
    root = folder(tmp_path / "data", "tagging", 8) if config == "tinybert-task" else "embedded"
    command = ["fit", "--config", str(HOME / "configs" / f"{config}.yaml"), "--data.root", str(root)]
    small = [] if config == "tinybert-task" else ["--data.cache_dir=cache", "--data.num_workers=1"]
    if config in ("distilbert", "tinybert-general"):
        small += ["--model.model.init_args.dim=24", "--data.tokenizer.init_args.vocab_size=300"]
    result = program(*command, *small, "--trainer.accelerator=cpu", cwd=tmp_path)
    assert result.code == 2
    assert "distillation.teacher is not set. Add --model.distillation.init_args.teacher with a run" in result.err
    assert not (tmp_path / "runs" / config).exists()


def test_errors_are_one_line(program: Program, tmp_path: Path) -> None:
    books(tmp_path)
    runs.write(tmp_path)
    assert program("fit", "--config", "c.yaml", cwd=tmp_path).code == 0
    command = ["distil", "report", "--teacher", "run", "--student", "run", "--data"]
    for options, expected in (
        (["books", "--num-timed=0"], "--num-timed: must be at least 1, got 0"),
        (["books", "--min-position=99999"], "--min-position (99999) must be below --max-length (16384)"),
        (["books", "--plot=no/a.png"], "/no' does not exist"),
        (["nowhere"], "nowhere"),
    ):
        result = program(*command, *options, cwd=tmp_path)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert expected in result.err
    result = program("distil", "report", "--teacher", "run", "--student", "none", "--data", "books", cwd=tmp_path)
    assert result.code == 2
    assert "'none' does not exist" in result.err
