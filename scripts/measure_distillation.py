"""Measure distillation: students against their teachers, and against the same students without them, seed by seed.

    python scripts/measure_distillation.py [--data FOLDER] [--output-dir runs/distillation] [--seeds 0 1 2]
        [--experiments NAME ...]

FOLDER holds babi, movie-reviews and pg19-mini. Each experiment trains a teacher, then every student several times
for equally many steps on the same batches: with the teacher ("distilled"), from the teacher's weights with labels alone
("initialized"), and with labels alone ("alone"). `memtx distil report` compares all of them on the test examples or
texts; masked language models have their loss on the validation texts. The experiments "distilbert" and "tinybert"
follow the published recipes at a small size. Finished runs and figures are not repeated, so the script can be
interrupted and restarted. Writes results.json, table.md and a picture for each experiment.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmarking
import torch
from distillation_runs import (
    LOSSES_MODULE,
    distillation_options,
    encoder_options,
    format_losses,
    step_options,
    train,
    train_distilbert,
    train_tinybert,
)
from training_runs import last_value, read_metrics, run_memtx

import memtx
from memtx import plots
from memtx.evaluation.compare import num_parameters


@dataclass(frozen=True)
class Student:
    """A student: its config, options that change it, and its distillation losses."""

    config: str
    options: list[str] = field(default_factory=list)
    losses: str = ""


@dataclass(frozen=True)
class Experiment:
    """A teacher, its students, and the options of the report that measures them."""

    data: str
    config: str
    options: list[str]
    students: dict[str, Student]
    report_options: list[str] = field(default_factory=list)
    trainings: tuple[str, ...] = ("distilled", "initialized", "alone")
    shares_teacher: bool = False  # among the seeds, which are then those of the students


def decoder_options(dim: int, hidden_dim: int) -> list[str]:
    """Return the options of a language model's sizes, with a batch size of 8."""
    model = "--model.model.init_args"
    return [
        f"{model}.dim={dim}",
        f"{model}.heads=4",
        f"{model}.feed_forward.init_args.hidden_dim={hidden_dim}",
        "--data.batch_size=8",
    ]


DISTILBERT_LOSSES = format_losses(
    SoftTargets={"temperature": 2.0}, HardLabels={"weight": 0.5},
    HiddenCosine={"layers": {"class_path": f"{LOSSES_MODULE}.LastLayer"}}, EmbeddingMSE={},
)  # fmt: skip
TINYBERT_LOSSES = format_losses(
    # Small weights, together with the targets from the start: with weight 1, a student this narrow stayed at chance for
    # 1,000 steps.
    EmbeddingMSE={"weight": 0.1, "end": 0.3},
    AttentionMSE={"weight": 0.1, "end": 0.3},
    HiddenMSE={"weight": 0.1, "end": 0.3, "layers": {"class_path": f"{LOSSES_MODULE}.LastLayer"}},
    SoftTargets={"temperature": 2.0},
    HardLabels={"weight": 0.5},
)


def schedule_options(epochs: int, learning_rate: float) -> list[str]:
    """Return options for fewer epochs and a narrow model's learning rate, the same with and without a teacher."""
    return [f"--trainer.max_epochs={epochs}", f"--model.optimizer.init_args.lr={learning_rate}"]


EXPERIMENTS = {
    "movie-reviews": Experiment(
        "movie-reviews",
        "movie-reviews",
        ["--model.backbone.init_args.depth=2"],
        {
            "DistilBERT's losses": Student(
                "movie-reviews", [*encoder_options(32, 1, 2, 64), *schedule_options(3, 2e-3)], DISTILBERT_LOSSES
            ),
            "TinyBERT's losses": Student(
                "movie-reviews", [*encoder_options(10, 1, 2, 32), *schedule_options(4, 4e-3)], TINYBERT_LOSSES
            ),
        },
    ),
    "pg19-mini": Experiment(
        "pg19-mini",
        "pg19-mini",
        [
            *decoder_options(64, 176),
            # The student's tokenizer, and attention alone.
            "--data.tokenizer={class_path: memtx.data.tokenizers.ByteTokenizer}",
            "--model.model.init_args.output_memory=null",
            "--data.segment_length=256",
            "--data.eval_tokens=100000",
            "--model.model.init_args.depth=4",
            '--model.model.init_args.memories=[{"class_path":"memtx.RecurrentMemory","init_args":{"window":256}}]',
            "--model.measure_memory_gain=false",
            *step_options(300),
        ],
        {"long-to-memory": Student("long-to-memory", [*decoder_options(64, 176), *step_options(200)])},
        # Beyond its window of 64 positions, the student has only its memory.
        ["--max-length=2048", "--min-position=64", "--limit=16"],
        shares_teacher=True,
    ),
}


NAMES = ["distilbert", "tinybert", *EXPERIMENTS]
LOWER_IS_BETTER = ("bits_per_byte", "nats_per_masked_token")


def run_report(
    teacher: Path, students: list[Path], data: Path, report_options: list[str] | None, output_path: Path
) -> dict[str, Any]:
    """Return the figures of `memtx distil report`, or of the last validation, which are saved in ``output_path``."""
    if not output_path.exists() and report_options is None:
        reference, others = measure_masked_model(teacher), [measure_masked_model(path) for path in students]
        for figures in others:
            figures["size_reduction"] = 1 - figures["num_parameters"] / reference["num_parameters"]
            figures |= {"speed_gain": None, "score_retention": reference["score"] / figures["score"]}
        output_path.write_text(json.dumps({"teacher": reference, "students": others}))
    elif not output_path.exists():
        run_memtx(
            "distil", "report", "--teacher", str(teacher), "--data", str(data), "--json", str(output_path),
            *(option for path in students for option in ("--student", str(path))), *(report_options or []),
            num_threads=1,
        )  # fmt: skip
    report: dict[str, Any] = json.loads(output_path.read_text())
    return report


def measure_masked_model(run_dir: Path) -> dict[str, Any]:
    """Return parameters and last validation loss of a run of masked language modeling."""
    model = memtx.from_pretrained(run_dir)
    score = last_value(read_metrics(run_dir), "val_loss")
    return {"num_parameters": num_parameters(model), "score": score, "metric": "nats_per_masked_token"}


def train_experiment(name: str, seed: int, arguments: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Train teacher and students of an experiment with one seed; return the runs by model and training."""
    experiment, data = EXPERIMENTS[name], arguments.data / EXPERIMENTS[name].data
    limit = [f"--trainer.max_steps={arguments.steps}", "--trainer.max_epochs=-1"] if arguments.steps else []
    teacher_seed = 0 if experiment.shares_teacher else seed
    teacher = arguments.output_dir / f"{name}-teacher-{teacher_seed}"
    runs = {("teacher", ""): teacher}
    train(teacher, experiment.config, data, teacher_seed, [*experiment.options, *limit])
    for model, student in experiment.students.items():
        for training in experiment.trainings:
            slug = model.replace("'", "").replace(" ", "-").lower()
            runs[model, training] = run_dir = arguments.output_dir / f"{name}-{slug}-{training}-{seed}"
            options = distillation_options(teacher, training, student.losses)
            train(run_dir, student.config, data, seed, [*student.options, *options, *limit])
    return runs


def run_experiment(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure an experiment with one seed; return a row for each model."""
    report_options: list[str] | None = []
    data = arguments.output_dir / "stories"
    if name in EXPERIMENTS:
        runs = train_experiment(name, seed, arguments)
        report_options, data = EXPERIMENTS[name].report_options, arguments.data / EXPERIMENTS[name].data
    elif name == "distilbert":
        runs, report_options = train_distilbert(seed, arguments), None
    else:
        runs = train_tinybert(seed, arguments)
    report_path = arguments.output_dir / f"{name}-{seed}.json"
    report = run_report(runs["teacher", ""], list(runs.values())[1:], data, report_options, report_path)
    return [
        {"experiment": name, "seed": seed, "model": model, "training": training, **figures}
        for (model, training), figures in zip(runs, (report["teacher"], *report["students"]), strict=True)
    ]


def rows_by_model(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Group the rows by experiment, model and training, in the order of their seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault((row["experiment"], row["model"], row["training"]), []).append(row)
    return groups


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the figures as Markdown, a line for each model, seeds side by side."""
    columns = (
        "experiment, model, parameters, smaller, faster, score by seed, retained, against initialized, against alone"
    )
    lines = ["| " + " | ".join(columns.split(", ")) + " |", "|---" * 9 + "|"]
    groups = rows_by_model(rows)
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        for (_, model, training), runs in ((key, runs) for key, runs in groups.items() if key[0] == experiment):
            scores = ", ".join(f"{row['score']:.3f}" for row in runs)
            ratios, gains = ["", "", ""], {"initialized": "", "alone": ""}
            if model != "teacher":
                for index, key in enumerate(("size_reduction", "speed_gain", "score_retention")):
                    values = [row[key] for row in runs if row[key] is not None]
                    ratios[index] = f"{statistics.mean(values):.0%}" if values else ""
            for other in gains if training.startswith("distilled") or training == "initialized" else ():
                controls = {row["seed"]: row["score"] for row in groups.get((experiment, model, other), [])}
                differences = [row["score"] - controls[row["seed"]] for row in runs if row["seed"] in controls]
                gains[other] = ", ".join(f"{value:+.3f}" for value in differences) if other != training else ""
            name = f"{model}, {training}" if training else model
            lines.append(
                f"| {experiment}, {runs[0]['metric'].replace('_', ' ')} | {name} | {runs[0]['num_parameters']:,} | "
                f"{ratios[0]} | {ratios[1]} | {scores} | {ratios[2]} | {gains['initialized']} | {gains['alone']} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_data_option(parser, "--data", text="a folder of data for each experiment")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--experiments", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="training steps; defaults to the configs'")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with benchmarking.progress_bar() as bar:
        # Seed by seed, so that an interrupted comparison has complete seeds.
        jobs = [(name, seed) for seed in arguments.seeds for name in arguments.experiments]
        for name, seed in bar.track(jobs, description="teachers and students"):
            rows += run_experiment(name, seed, arguments)
            (arguments.output_dir / "table.md").write_text("\n".join(format_table(rows)) + "\n")
            results = {"machine": benchmarking.machine_info(torch.device("cpu")), "rows": rows}
            (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    for name in arguments.experiments:
        scores = {}
        for (experiment, model, training), runs in rows_by_model(rows).items():
            if experiment == name:
                scores[f"{model}, {training}" if training else model] = [row["score"] for row in runs]
                metric = runs[0]["metric"]
        plots.plot_seed_comparison(
            arguments.output_dir / f"{name}.png", scores, title=f"{name}: students with and without their teacher",
            unit=metric.replace("_", " "), lower_is_better=metric in LOWER_IS_BETTER,
        )  # fmt: skip
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    main()
