"""What a teacher is worth: students beside their teachers, and beside themselves trained without one, seed by seed.

    python scripts/measure_distillation.py --data FOLDER [--output-dir runs/distillation] [--seeds 0 1 2]
        [--experiments NAME ...]

FOLDER holds movie-reviews, conll2000 and pg19-mini. Of each part a teacher is trained, then every student twice for
equally many steps on the same batches: with the teacher, and by labels alone. `memtx distil report` measures all of
them side by side on the test examples, or the test texts. Runs and figures that are there are not made again, so the
script can be stopped and started. Writes results.json, table.md and a picture a part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measuring
import torch
from learning import run_fit

from memtx import plots

REPO_ROOT = Path(__file__).resolve().parent.parent
LOSSES_MODULE = "memtx.training.distillation"


def format_losses(**weights: dict[str, Any]) -> str:
    """Return losses of these classes and settings as an option's text."""
    return json.dumps(
        [{"class_path": f"{LOSSES_MODULE}.{name}", "init_args": given} for name, given in weights.items()]
    )


def distillation_options(teacher: Path | None, losses: str) -> list[str]:
    """Return the options of a student's run: with a teacher, or by labels.

    With losses of its own it begins with the embeddings of its teacher, else as its config says.
    """
    if teacher is None:
        return ["--model.distillation", "null"]
    own = [
        "--model.distillation", f"{LOSSES_MODULE}.Distillation", "--model.distillation.losses", losses,
        "--model.distillation.init_args.student_init", f"{LOSSES_MODULE}.NoLayers",
    ]  # fmt: skip
    return [*(own if losses else []), "--model.distillation.init_args.teacher", str(teacher)]


@dataclass(frozen=True)
class Student:
    """One student: its config, what of it is changed, and what it learns of the teacher."""

    config: str
    options: list[str] = field(default_factory=list)
    losses: str = ""


@dataclass(frozen=True)
class Experiment:
    """A teacher, its students, and how they are measured."""

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
    """Return the options of a language model's sizes, on batches of 8 rows."""
    model = "--model.model.init_args"
    return [
        f"{model}.dim={dim}",
        f"{model}.heads=4",
        f"{model}.feed_forward.init_args.hidden_dim={hidden_dim}",
        "--data.batch_size=8",
    ]


def step_options(count: int) -> list[str]:
    """Return the options of a run's length, validated at its end."""
    return [f"--trainer.max_steps={count}", f"--trainer.val_check_interval={count}"]


DISTILBERT_LOSSES = format_losses(
    SoftTargets={"temperature": 2.0},
    HardLabels={"weight": 0.5},
    HiddenCosine={"layers": {"class_path": f"{LOSSES_MODULE}.LastLayer"}},
    EmbeddingMSE={},
)
TINYBERT_LOSSES = format_losses(
    # Light, and beside the answers from the start: with weight 1 so narrow a student stayed at chance for 1,000 steps.
    EmbeddingMSE={"weight": 0.1, "end": 0.3},
    AttentionMSE={"weight": 0.1, "end": 0.3},
    HiddenMSE={"weight": 0.1, "end": 0.3, "layers": {"class_path": f"{LOSSES_MODULE}.LastLayer"}},
    SoftTargets={"temperature": 2.0},
    HardLabels={"weight": 0.5},
)


def schedule_options(epochs: int, learning_rate: float) -> list[str]:
    """Return fewer passes than the teacher's, and a rate for a narrow model; with a teacher and without one alike."""
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
            "--data.segment_length=256",
            "--data.eval_tokens=100000",
            "--model.model.init_args.depth=4",
            '--model.model.init_args.memories=[{"class_path":"memtx.RecurrentMemory","init_args":{"window":256}}]',
            "--model.measure_memory_gain=false",
            *step_options(800),
        ],
        {"long-to-memory": Student("long-to-memory", [*decoder_options(96, 256), *step_options(500)])},
        # The student's window is 64 positions: beyond it there is its memory alone.
        ["--max-length=8192", "--min-position=64", "--limit=16"],
    ),
}


def run_report(
    teacher: Path, students: list[Path], data: Path, experiment: Experiment, output_path: Path
) -> dict[str, Any]:
    """Return what `memtx distil report` measures of runs."""
    if not output_path.exists():
        command = [
            sys.executable, "-m", "memtx", "distil", "report", "--teacher", str(teacher), "--data", str(data),
            *(one for path in students for one in ("--student", str(path))), "--json", str(output_path),
            *experiment.report_options,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(output_path.read_text())
    return found


def run_experiment(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure one part with one seed; return a row a model."""
    part, data = EXPERIMENTS[name], arguments.data / EXPERIMENTS[name].data
    teacher = arguments.output_dir / f"{name}-teacher-{seed}"
    done = arguments.output_dir / f"{name}-{seed}.json"
    runs = {}
    for student in part.students:
        for how in ("distilled", "alone"):
            called = student.replace("'", "").replace(" ", "-").lower()
            runs[student, how] = arguments.output_dir / f"{name}-{called}-{how}-{seed}"
    if not done.exists():
        short = [f"--trainer.max_steps={arguments.steps}", "--trainer.max_epochs=-1"] if arguments.steps else []
        train(teacher, part.config, data, seed, [*part.options, *short])
        for (student, how), run in runs.items():
            one = part.students[student]
            learns = distillation_options(teacher if how == "distilled" else None, one.losses)
            train(run, one.config, data, seed, [*one.options, *learns, *short])
    found = run_report(teacher, list(runs.values()), data, part, done)
    rows = [{"experiment": name, "seed": seed, "model": "teacher", "training": "", **found["teacher"]}]
    for (student, how), figures in zip(runs, found["students"], strict=True):
        rows.append({"experiment": name, "seed": seed, "model": student, "training": how, **figures})
    return rows


def train(run_dir: Path, config: str, data: Path, seed: int, options: list[str]) -> None:
    """Train a run, unless it is done."""
    done = run_dir / "done"
    if not done.exists():
        run_fit(run_dir, str(REPO_ROOT / "configs" / f"{config}.yaml"), data, seed, options)
        done.touch()


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the figures as Markdown, a row a model, seeds side by side."""
    lines = ["| part | model | parameters | smaller | faster | score, seed by seed | kept | against alone |"]
    lines.append("|---" * 8 + "|")
    for part in dict.fromkeys(row["experiment"] for row in rows):
        own = [row for row in rows if row["experiment"] == part]
        for model, how in dict.fromkeys((row["model"], row["training"]) for row in own):
            of = sorted(
                (row for row in own if (row["model"], row["training"]) == (model, how)), key=lambda row: row["seed"]
            )
            scores = ", ".join(f"{row['score']:.3f}" for row in of)
            shares = ["", "", ""]
            gains = ""
            if model != "teacher":
                shares = [
                    f"{statistics.mean(row[key] for row in of):.0%}"
                    for key in ("size_reduction", "speed_gain", "score_retention")
                ]
            if how == "distilled":
                alone = {
                    row["seed"]: row["score"] for row in own if (row["model"], row["training"]) == (model, "alone")
                }
                gains = ", ".join(f"{row['score'] - alone[row['seed']]:+.3f}" for row in of)
            called = f"{model}, {how}" if how else model
            lines.append(
                f"| {part}, {of[0]['metric'].replace('_', ' ')} | {called} | {of[0]['num_parameters']:,} | "
                f"{shares[0]} | {shares[1]} | {scores} | {shares[2]} | {gains} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds a folder for each part")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="instead of the configs'")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with measuring.progress_bar() as bar:
        # Seed by seed, so that a comparison that is stopped has whole seeds.
        jobs = [(part, seed) for seed in arguments.seeds for part in arguments.experiments]
        for part, seed in bar.track(jobs, description="teachers and students"):
            rows += run_experiment(part, seed, arguments)
            lines = format_table(rows)
            (arguments.output_dir / "table.md").write_text("\n".join(lines) + "\n")
            found = {"machine": measuring.machine_info(torch.device("cpu")), "rows": rows}
            (arguments.output_dir / "results.json").write_text(json.dumps(found, indent=2))
    for part in arguments.experiments:
        own = [row for row in rows if row["experiment"] == part]
        scores: dict[str, list[float]] = {}
        for row in own:
            scores.setdefault(f"{row['model']}, {row['training']}" if row["training"] else row["model"], []).append(
                row["score"]
            )
        measure = own[0]["metric"]
        plots.plot_seed_comparison(
            arguments.output_dir / f"{part}.png",
            scores,
            title=f"{part}: students with and without their teacher",
            unit=measure.replace("_", " "),
            lower_is_better=measure == "bits_per_byte",
        )
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    main()
