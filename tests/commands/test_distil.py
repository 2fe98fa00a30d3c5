"""The distillation configs with tiny models, and `memtx distil report` on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memtx
from memtx.data.hf_tokenizers import HFTokenizer
from tests.commands import runs
from tests.commands.program import HOME, Program
from tests.inference.test_published_tasks import folder_of
from tests.tasks import folder

SHORT = [
    "--trainer.max_steps=2",
    "--trainer.max_epochs=-1",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]
EXACT = ["--data.batch_size=2", "--data.segment_length=16", "--trainer.accumulate_grad_batches=1"]
EXACT += ["--trainer.precision=32-true"]
TEACHER = "--model.distillation.init_args.teacher=teacher"


def fit(program: Program, workdir: Path, config: str, run: str, *options: str) -> set[str]:
    """Train, and return the names of the logged metrics."""
    path = str(HOME / "configs" / config)
    result = program("fit", "--config", path, "--run_dir", run, *SHORT, *options, cwd=workdir)
    assert result.code == 0, result.err
    return set((workdir / run / "metrics.csv").read_text().partition("\n")[0].split(","))


def read_losses(run: Path) -> list[dict[str, float]]:
    """Return the logged losses of each step."""
    with (run / "metrics.csv").open() as file:
        lines = [row for row in csv.DictReader(file) if row["train_loss"]]
    return [{name[6:]: float(value or 0) for name, value in row.items() if name.startswith("train_")} for row in lines]


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


def test_tinybert_in_two_commands_from_published_folders(program: Program, tmp_path: Path) -> None:
    labels = {"0": "neg", "1": "pos"}
    folder_of(tmp_path / "bert", "Bert", "MaskedLM")
    folder_of(tmp_path / "teacher", "Bert", "SequenceClassification", id2label=labels)
    folder(tmp_path / "data", "classification", 6)
    augment = ["distil", "augment", "--model", "bert", "--data", "data", "--output", "augmented", "--device", "cpu"]
    result = program(*augment, "--num-variants=3", cwd=tmp_path)
    assert result.code == 0, result.err
    sizes = {"dim": 4, "depth": 1, "heads": 2, "hidden_dim": 8, "embeddings.init_args.num_positions": 66}
    student = [f"--model.model.init_args.{name}={value}" for name, value in sizes.items()]
    options = ["--data.tokenizer.init_args.path=bert", "--model.distillation.init_args.teacher=bert", *EXACT]
    general = fit(program, tmp_path, "tinybert-general.yaml", "general", *books(tmp_path), *student, *options)
    assert {"train_embedding_mse", "train_attention_mse", "train_hidden_mse"} <= general
    metrics = fit(
        program, tmp_path, "tinybert-task.yaml", "student", "--data.root=augmented", "--data.batch_size=2", TEACHER,
        "--data.tokenizer.init_args.path=teacher", "--model.pretrained=general", "--trainer.max_steps=10",
        "--data.task.init_args.max_length=32", "--data.task.init_args.stride=16",
    )  # fmt: skip
    assert {"train_embedding_mse", "train_attention_mse", "train_hidden_mse", "train_soft_targets"} <= metrics
    # Intermediate layers first, then predictions (TinyBERT, Jiao et al. 2020, section 4.2).
    lines = read_losses(tmp_path / "student")
    assert len(lines) == 10
    for step, losses in enumerate(lines):
        names = ["embedding_mse", "attention_mse", "hidden_mse"] if step < 9 else ["soft_targets"]
        # float32, as logged
        assert losses["loss"] == pytest.approx(sum(losses[name] for name in names), rel=1e-5), step
    command = ["distil", "report", "--teacher", "teacher", "--student", "student", "--data", "data", "--json", "-"]
    result = program(*command, "--num-timed=2", cwd=tmp_path)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["teacher"]["metric"] == "accuracy"
    assert report["students"][0]["num_parameters"] < report["teacher"]["num_parameters"]
    result = program("predict", "--checkpoint", "student", "--text", "captain Ahab swims", cwd=tmp_path)
    assert result.code == 0, result.err
    # Labels in another order than the teacher's would teach the opposite.
    command = ["fit", "--config", str(HOME / "configs" / "tinybert-task.yaml"), "--data.root=data", *SHORT, TEACHER]
    result = program(
        *command, "--data.tokenizer.init_args.path=teacher", "--data.task.init_args.labels=[pos, neg]", "--run_dir=x",
        "--model.pretrained=general", cwd=tmp_path,
    )  # fmt: skip
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "has the labels neg, pos, the data pos, neg" in result.err


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_distilbert_from_a_published_folder_with_its_own_tokenizer(
    program: Program, tmp_path: Path, family: str
) -> None:
    teacher = folder_of(tmp_path / "teacher", family, "MaskedLM")
    config = json.loads((teacher / "config.json").read_text())
    # A published vocabulary may be padded beyond the ids of its tokenizer.
    weights = load_file(teacher / "model.safetensors")
    size = config["vocab_size"]
    for name, tensor in weights.items():
        if tensor.shape[0] == size:
            weights[name] = torch.cat([tensor, torch.zeros_like(tensor[:3])])
    save_file(weights, teacher / "model.safetensors")
    (teacher / "config.json").write_text(json.dumps({**config, "vocab_size": size + 3}))
    embeddings = "--model.model.init_args.embeddings.init_args"
    names = ("hidden_size", "num_attention_heads", "intermediate_size")
    sizes = dict(zip(("dim", "heads", "hidden_dim"), (config[name] for name in names), strict=True))
    options = [f"--model.model.init_args.{name}={value}" for name, value in {**sizes, "depth": 1}.items()]
    options += [f"{embeddings}.num_positions={config['max_position_embeddings']}"]
    if family == "Roberta":
        options += [f"{embeddings}.pad_token_id=1", f"{embeddings}.roberta_positions=true"]
    options += [*EXACT, TEACHER, "--trainer.max_steps=1", "--model.optimizer.init_args.lr=0.0"]
    metrics = fit(
        program, tmp_path, "distilbert.yaml", "student", *books(tmp_path), *options,
        "--data.tokenizer.init_args.path=teacher", "--trainer.val_check_interval=1",
    )  # fmt: skip
    assert {"train_soft_targets", "train_hard_labels", "train_hidden_cosine"} <= metrics
    tokenizer = HFTokenizer(str(teacher))
    models = [memtx.from_pretrained(tmp_path / name).state_dict() for name in ("teacher", "student")]
    name = "blocks.0.attention.query.weight"
    assert torch.equal(models[0][name], models[1][name])
    table = "embedding.word_embeddings.weight"
    # The student has the tokenizer's ids, its mask token among them.
    assert torch.equal(models[0][table][: tokenizer.vocab_size], models[1][table])
    # Texts in the ids of another tokenizer would be noise to the teacher.
    folder_of(tmp_path / "other", "Roberta" if family == "Bert" else "Bert", "MaskedLM")
    command = ["fit", "--config", str(HOME / "configs" / "distilbert.yaml"), *SHORT, *books(tmp_path), *options]
    result = program(*command, "--data.tokenizer.init_args.path=other", "--run_dir=x", cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "The tokenizer in 'teacher' is not that of the data" in result.err


@pytest.mark.parametrize("config", ["distilbert", "tinybert-general", "tinybert-task", "long-to-memory"])
def test_a_missing_teacher_is_reported_with_its_option(program: Program, tmp_path: Path, config: str) -> None:
    is_task = config == "tinybert-task"
    root = folder(tmp_path / "data", "classification", 8) if is_task else "embedded"
    command = ["fit", "--config", str(HOME / "configs" / f"{config}.yaml"), "--data.root", str(root)]
    options = [] if is_task else ["--data.cache_dir=cache", "--data.num_workers=1"]
    if config != "long-to-memory":
        folder_of(tmp_path / "bert", "Bert", "MaskedLM")
        options += ["--data.tokenizer.init_args.path=bert"]
        options += [f"--model.{'backbone' if is_task else 'model'}.init_args.dim=24"]
    result = program(*command, *options, "--trainer.accelerator=cpu", cwd=tmp_path)
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
