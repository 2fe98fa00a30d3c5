"""Runs of distillation: options of students, and the published recipes of DistilBERT and TinyBERT at a small size."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from training_runs import last_value, read_metrics, run_fit, run_memtx

LOSSES_MODULE = "memtx.training.distillation"
TOKENIZER = "{{class_path: memtx.data.hf_tokenizers.{}, init_args: {{{}}}}}"
TEACHER_DEPTH, TEACHER_DIM = 4, 64
CPU_SECONDS = ("--trainer.callbacks+=training_runs.CpuSeconds", "--trainer.log_every_n_steps=20")
MASKED_STEPS, STUDENT_STEPS, GENERAL_STEPS, TASK_EPOCHS = 1500, 400, 800, 23


def format_losses(**weights: dict[str, Any]) -> str:
    """Format losses, given by class name and settings, as the text of an option."""
    return json.dumps(
        [{"class_path": f"{LOSSES_MODULE}.{name}", "init_args": settings} for name, settings in weights.items()]
    )


def distillation_options(teacher: Path, training: str, losses: str) -> list[str]:
    """Return the options of a student's run: "distilled", "initialized" from the teacher's weights, or "alone".

    Custom losses come with the teacher's embeddings as initialization; without them, the config decides both.
    """
    if training == "alone":
        return ["--model.distillation", "null"]
    custom = [
        "--model.distillation", f"{LOSSES_MODULE}.Distillation", "--model.distillation.losses", losses,
        "--model.distillation.init_args.student_init", f"{LOSSES_MODULE}.NoLayers",
    ]  # fmt: skip
    labels = ["--model.distillation.init_args.losses", format_losses(HardLabels={})]
    return [
        *(custom if losses else []),
        *(labels if training == "initialized" else []),
        "--model.distillation.init_args.teacher",
        str(teacher),
    ]


def encoder_options(dim: int, depth: int, heads: int, hidden_dim: int) -> list[str]:
    """Return the options of an encoder's sizes."""
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden_dim": hidden_dim}
    return [f"--model.backbone.init_args.{name}={value}" for name, value in sizes.items()]


def step_options(count: int) -> list[str]:
    """Return the options of a run of ``count`` steps, validated at its end."""
    return [f"--trainer.max_steps={count}", f"--trainer.val_check_interval={count}"]


def attention_list(depth: int) -> str:
    """Return layers that see two neighbors on each side, then as many that see all tokens.

    With full attention alone, no masked language model of this size gets beyond the frequencies of the tokens for
    thousands of steps.
    """
    window = "{class_path: memtx.layers.longformer.LongformerAttention, init_args: {window: 4}}"
    full = "{class_path: memtx.layers.encoder_attention.FullAttention}"
    return f"[{', '.join([window] * (depth // 2) + [full] * (depth // 2))}]"


def masked_options(depth: int, dim: int, steps: int) -> list[str]:
    """Return the options of a small masked language model's run, with four heads and one learning rate for all."""
    sizes = {"depth": depth, "dim": dim, "heads": 4, "hidden_dim": 4 * dim, "dropout": 0.0}
    return [
        *(f"--model.model.init_args.{name}={value}" for name, value in sizes.items()),
        f"--model.model.init_args.attentions={attention_list(depth)}",
        "--model.model.init_args.embeddings.init_args.dropout=0.0",
        f"--data.tokenizer={TOKENIZER.format('WordPieceTokenizer', 'vocab_size: 200')}",
        "--data.segment_length=94", "--data.batch_size=10", "--data.eval_batch_size=32", "--data.eval_tokens=30000",
        "--data.num_workers=1", "--model.optimizer.init_args.lr=2e-3",
        f"--model.scheduler.init_args.warmup_steps={steps // 10}", "--trainer.precision=32-true",
        "--trainer.accumulate_grad_batches=1", "--trainer.accelerator=cpu", *step_options(steps),
        *CPU_SECONDS,
    ]  # fmt: skip


def write_stories(source: Path, target: Path) -> None:
    """Write bAbI's stories as texts, with their answers, and the questions of its first task as examples."""
    for split, name in (("train", "train"), ("validation", "train"), ("test", "test")):
        (target / "texts" / split).mkdir(parents=True, exist_ok=True)
        for path in sorted(source.glob(f"qa*_{name}.txt")):
            # A story begins at a line numbered 1.
            stories = [text.splitlines() for text in re.split(r"^1 ", path.read_text(encoding="utf-8"), flags=re.M)[1:]]
            cut = len(stories) * 9 // 10
            part = {"train": stories[:cut], "validation": stories[cut:], "test": stories}[split]
            texts, examples = [], []
            for story in part:
                lines = [re.sub(r"^\d+ ", "", line).split("\t") for line in story]
                texts.append(
                    " ".join(" ".join([line[0].strip(), *(f"{answer}." for answer in line[1:2])]) for line in lines)
                )
                facts = ""
                for sentence, *answers in lines:
                    if answers:
                        examples.append({"text": facts + sentence.strip(), "label": answers[0]})
                    else:
                        facts += sentence.strip() + " "
            (target / "texts" / split / path.name).write_text("\n\n".join(texts), encoding="utf-8")
            if path.name.startswith("qa1_"):
                lines_of_json = "".join(json.dumps(example) + "\n" for example in examples)
                (target / f"{split}.jsonl").write_text(lines_of_json, encoding="utf-8")


def train_masked_teacher(seed: int, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Train the teacher of masked language modeling on the stories; return its run and the folder of the stories."""
    stories, teacher = arguments.output_dir / "stories", arguments.output_dir / f"teacher-{seed}"
    if not stories.exists():
        write_stories(arguments.data / "babi", stories)
    steps = arguments.steps or MASKED_STEPS
    options = [*masked_options(TEACHER_DEPTH, TEACHER_DIM, steps), "--model.distillation=null"]
    train(teacher, "distilbert", stories / "texts", seed, options)
    return teacher, stories


def run_folder(folder: Path, experiment: str, training: str, seed: int) -> Path:
    """Return the folder of a student's run."""
    return folder / f"{experiment}-{training.replace(', ', '-').replace(' ', '-')}-{seed}"


def count_steps(steps: int, training: str, folder: Path, experiment: str, seed: int) -> int:
    """Return the steps of a training: ``steps``, or as many as took the time of the distilled run."""
    if not training.endswith("time"):
        return steps
    seconds = [
        last_value(read_metrics(run_folder(folder, experiment, name, seed)), "cpu_seconds")
        for name in ("distilled", "initialized")
    ]
    return round(steps * seconds[0] / seconds[1])


def train_distilbert(seed: int, arguments: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Train students by the recipe of DistilBERT; return the runs."""
    teacher, stories = train_masked_teacher(seed, arguments)
    runs, steps = {("teacher", ""): teacher}, arguments.steps or STUDENT_STEPS
    for training in ("distilled", "initialized", "initialized, equal time", "alone"):
        run_dir = run_folder(arguments.output_dir, "distilbert", training, seed)
        count = count_steps(steps, training, arguments.output_dir, "distilbert", seed)
        options = masked_options(TEACHER_DEPTH // 2, TEACHER_DIM, count)
        train(run_dir, "distilbert", stories / "texts", seed, [
            *options, *distillation_options(teacher, training.partition(",")[0], ""),
        ])  # fmt: skip
        runs["half of the layers", training] = run_dir
    return runs


def train_tinybert(seed: int, arguments: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Train TinyBERT's stages; return the runs. Its augmentation is left out: other words have other answers."""
    bert, data = train_masked_teacher(seed, arguments)
    folder = arguments.output_dir
    general, depth, dim = folder / f"tinybert-general-{seed}", TEACHER_DEPTH // 2, TEACHER_DIM // 2
    options = masked_options(depth, dim, arguments.steps or GENERAL_STEPS)
    losses = f"--model.distillation.init_args.teacher={bert}"
    train(general, "tinybert-general", data / "texts", seed, [*options, losses])
    models = {}
    for run in (bert, general):
        models[run] = run.with_name(f"{run.name}-model")
        if not models[run].exists():
            run_memtx("convert", str(run), str(models[run]), num_threads=1)
    steps = arguments.steps or TASK_EPOCHS * -(-len((data / "train.jsonl").read_text().splitlines()) // 32)

    def task_options(count: int) -> list[str]:
        return [
            f"--data.tokenizer={TOKENIZER.format('HFTokenizer', f'path: {models[bert]}')}", "--trainer.max_epochs=-1",
            f"--trainer.max_steps={count}", "--trainer.check_val_every_n_epoch=null", "--trainer.accelerator=cpu",
            f"--trainer.val_check_interval={max(1, count // 23)}", *CPU_SECONDS,
            "--model.optimizer.init_args.lr=2e-3",
        ]  # fmt: skip

    def one_decay(count: int) -> list[str]:
        name = "memtx.training.optimizers.WarmupLinear"
        return [f"--model.scheduler={{class_path: {name}, init_args: {{warmup_steps: {count // 10}}}}}"]

    runs = {("teacher", ""): folder / f"tinybert-teacher-{seed}"}
    without = ["--model.distillation=null"]
    options = [*task_options(steps), *one_decay(steps), *without, f"--model.pretrained={models[bert]}"]
    train(runs["teacher", ""], "tinybert-task", data, seed, options)
    distillation = [f"--model.distillation.init_args.teacher={runs['teacher', '']}"]
    from_general = [f"--model.pretrained={models[general]}"]
    scratch = [
        *encoder_options(dim, depth, 4, 4 * dim),
        f"--model.backbone.init_args.attentions={attention_list(depth)}",
    ]
    for training, options in (
        ("distilled", [*from_general, *distillation]),
        ("distilled, one decay", [*from_general, *distillation, *one_decay(steps)]),
        ("initialized", [*from_general, *without, *one_decay(steps)]),
        ("initialized, equal time", [*from_general, *without]),
        ("alone", [*scratch, *without, *one_decay(steps)]),
    ):
        run_dir = run_folder(folder, "tinybert", training, seed)
        count = count_steps(steps, training, folder, "tinybert", seed)
        if training.endswith("time"):
            options = [*options, *one_decay(count)]
        train(run_dir, "tinybert-task", data, seed, [*task_options(count), *options])
        runs["half of layers and width", training] = run_dir
    return runs


def train(run_dir: Path, config: str, data: Path, seed: int, options: list[str]) -> None:
    """Train a run, unless it is finished."""
    marker = run_dir / "done"
    if not marker.exists():
        run_fit(run_dir, config, data, seed, options)
        marker.touch()
