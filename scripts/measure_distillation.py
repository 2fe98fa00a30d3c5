"""Measure distillation: students against their teachers, and against the same students trained alone, seed by seed.

    python scripts/measure_distillation.py [--data FOLDER] [--output-dir runs/distillation] [--seeds 0 1 2]
        [--experiments NAME ...]

FOLDER holds movie-reviews, conll2000 and pg19-mini. Each experiment trains a teacher, then every student twice for
equally many steps on the same batches: with the teacher, and with labels alone. `memtx distil report` compares all of
them on the test examples or texts. Finished runs and figures are not repeated, so the script can be interrupted and
restarted. Writes results.json, table.md and a picture for each experiment.
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
from training_runs import run_fit, run_memtx

from memtx import plots

LOSSES_MODULE = "memtx.training.distillation"


def format_losses(**weights: dict[str, Any]) -> str:
    """Format losses, given by class name and settings, as the text of an option."""
    return json.dumps(
        [{"class_path": f"{LOSSES_MODULE}.{name}", "init_args": settings} for name, settings in weights.items()]
    )


def distillation_options(teacher: Path | None, losses: str) -> list[str]:
    """Return the options of a student's run with a teacher, or with labels alone.

    Custom losses come with the teacher's embeddings as initialization; without them, the config decides both.
    """
    if teacher is None:
        return ["--model.distillation", "null"]
    custom = [
        "--model.distillation", f"{LOSSES_MODULE}.Distillation", "--model.distillation.losses", losses,
        "--model.distillation.init_args.student_init", f"{LOSSES_MODULE}.NoLayers",
    ]  # fmt: skip
    return [*(custom if losses else []), "--model.distillation.init_args.teacher", str(teacher)]


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


def encoder_options(dim: int, depth: int, heads: int, hidden_dim: int) -> list[str]:
    """Return the options of an encoder's sizes."""
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden_dim": hidden_dim}
    return [f"--model.backbone.init_args.{name}={value}" for name, value in sizes.items()]


def decoder_options(dim: int, hidden_dim: int) -> list[str]:
    """Return the options of a language model's sizes, with a batch size of 8."""
    model = "--model.model.init_args"
    return [
        f"{model}.dim={dim}",
        f"{model}.heads=4",
        f"{model}.feed_forward.init_args.hidden_dim={hidden_dim}",
        "--data.batch_size=8",
    ]


def step_options(count: int) -> list[str]:
    """Return the options of a run of ``count`` steps, validated at its end."""
    return [f"--trainer.max_steps={count}", f"--trainer.val_check_interval={count}"]


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
    "conll2000": Experiment(
        "conll2000",
        "conll2000",
        [],
        {
            "DistilBERT's losses": Student("conll2000", encoder_options(96, 1, 2, 192), DISTILBERT_LOSSES),
            "TinyBERT's losses": Student("tinybert-task"),
        },
    ),
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
            *decoder_options(96, 256),
            # The student's tokenizer, and attention alone.
            "--data.tokenizer={class_path: memtx.data.tokenizers.ByteTokenizer}",
            "--model.model.init_args.output_memory=null",
            "--data.segment_length=256",
            "--data.eval_tokens=100000",
            "--model.model.init_args.depth=4",
            '--model.model.init_args.memories=[{"class_path":"memtx.RecurrentMemory","init_args":{"window":256}}]',
            "--model.measure_memory_gain=false",
            *step_options(800),
        ],
        {"long-to-memory": Student("long-to-memory", [*decoder_options(96, 256), *step_options(500)])},
        # Beyond its window of 64 positions, the student has only its memory.
        ["--max-length=8192", "--min-position=64", "--limit=16"],
    ),
}


def run_report(
    teacher: Path, students: list[Path], data: Path, experiment: Experiment, output_path: Path
) -> dict[str, Any]:
    """Return the figures of `memtx distil report`, which are saved in ``output_path``."""
    if not output_path.exists():
        run_memtx(
            "distil", "report", "--teacher", str(teacher), "--data", str(data), "--json", str(output_path),
            *(option for path in students for option in ("--student", str(path))), *experiment.report_options,
            num_threads=1,
        )  # fmt: skip
    report: dict[str, Any] = json.loads(output_path.read_text())
    return report


def run_experiment(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure an experiment with one seed; return a row for each model."""
    experiment, data = EXPERIMENTS[name], arguments.data / EXPERIMENTS[name].data
    teacher = arguments.output_dir / f"{name}-teacher-{seed}"
    report_path = arguments.output_dir / f"{name}-{seed}.json"
    runs = {}
    for model in experiment.students:
        for training in ("distilled", "alone"):
            slug = model.replace("'", "").replace(" ", "-").lower()
            runs[model, training] = arguments.output_dir / f"{name}-{slug}-{training}-{seed}"
    if not report_path.exists():
        limit = [f"--trainer.max_steps={arguments.steps}", "--trainer.max_epochs=-1"] if arguments.steps else []
        train(teacher, experiment.config, data, seed, [*experiment.options, *limit])
        for (model, training), run_dir in runs.items():
            student = experiment.students[model]
            options = distillation_options(teacher if training == "distilled" else None, student.losses)
            train(run_dir, student.config, data, seed, [*student.options, *options, *limit])
    report = run_report(teacher, list(runs.values()), data, experiment, report_path)
    rows = [{"experiment": name, "seed": seed, "model": "teacher", "training": "", **report["teacher"]}]
    for (model, training), figures in zip(runs, report["students"], strict=True):
        rows.append({"experiment": name, "seed": seed, "model": model, "training": training, **figures})
    return rows


def train(run_dir: Path, config: str, data: Path, seed: int, options: list[str]) -> None:
    """Train a run, unless it is finished."""
    marker = run_dir / "done"
    if not marker.exists():
        run_fit(run_dir, config, data, seed, options)
        marker.touch()


def rows_by_model(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Group the rows by experiment, model and training, in the order of their seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault((row["experiment"], row["model"], row["training"]), []).append(row)
    return groups


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the figures as Markdown, a line for each model, seeds side by side."""
    lines = ["| experiment | model | parameters | smaller | faster | score by seed | retained | against alone |"]
    lines.append("|---" * 8 + "|")
    groups = rows_by_model(rows)
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        for (_, model, training), runs in ((key, runs) for key, runs in groups.items() if key[0] == experiment):
            scores = ", ".join(f"{row['score']:.3f}" for row in runs)
            ratios, gains = ["", "", ""], ""
            if model != "teacher":
                keys = ("size_reduction", "speed_gain", "score_retention")
                ratios = [f"{statistics.mean(row[key] for row in runs):.0%}" for key in keys]
            if training == "distilled":
                alone = {row["seed"]: row["score"] for row in groups[experiment, model, "alone"]}
                gains = ", ".join(f"{row['score'] - alone[row['seed']]:+.3f}" for row in runs)
            name = f"{model}, {training}" if training else model
            lines.append(
                f"| {experiment}, {runs[0]['metric'].replace('_', ' ')} | {name} | {runs[0]['num_parameters']:,} | "
                f"{ratios[0]} | {ratios[1]} | {scores} | {ratios[2]} | {gains} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_data_option(parser, "--data", text="a folder of data for each experiment")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
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
            unit=metric.replace("_", " "), lower_is_better=metric == "bits_per_byte",
        )  # fmt: skip
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    main()
