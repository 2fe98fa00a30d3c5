"""What a teacher is worth: students beside their teachers, and beside themselves trained without one, seed by seed.

    python scripts/measure_distillation.py --data FOLDER [--out runs/distillation] [--seeds 0 1 2] [--parts NAME ...]

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
from learning import fitted

from memtx import plots

HOME = Path(__file__).resolve().parent.parent
LOSSES = "memtx.training.distillation"


def losses(**weights: dict[str, Any]) -> str:
    """Return losses of these classes and settings as an option's text."""
    return json.dumps([{"class_path": f"{LOSSES}.{name}", "init_args": given} for name, given in weights.items()])


def distilled(teacher: Path | None, learns: str) -> list[str]:
    """Return the options of a student's run: with a teacher, or by labels.

    With losses of its own it begins with the embeddings of its teacher, else as its config says.
    """
    if teacher is None:
        return ["--model.distillation", "null"]
    own = [
        "--model.distillation", f"{LOSSES}.Distillation", "--model.distillation.losses", learns,
        "--model.distillation.init_args.start", f"{LOSSES}.NoLayers",
    ]  # fmt: skip
    return [*(own if learns else []), "--model.distillation.init_args.teacher", str(teacher)]


@dataclass(frozen=True)
class Student:
    """One student: its config, what of it is changed, and what it learns of the teacher."""

    config: str
    settings: list[str] = field(default_factory=list)
    learns: str = ""


@dataclass(frozen=True)
class Part:
    """A teacher, its students, and how they are measured."""

    data: str
    config: str
    settings: list[str]
    students: dict[str, Student]
    report: list[str] = field(default_factory=list)


def encoder(dim: int, depth: int, heads: int, hidden: int) -> list[str]:
    """Return the options of an encoder's sizes."""
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden}
    return [f"--model.body.init_args.{name}={value}" for name, value in sizes.items()]


def decoder(dim: int, hidden: int) -> list[str]:
    """Return the options of a language model's sizes, on batches of 8 rows."""
    model = "--model.model.init_args"
    return [
        f"{model}.dim={dim}",
        f"{model}.heads=4",
        f"{model}.feed_forward.init_args.hidden={hidden}",
        "--data.rows=8",
    ]


def steps(count: int) -> list[str]:
    """Return the options of a run's length, validated at its end."""
    return [f"--trainer.max_steps={count}", f"--trainer.val_check_interval={count}"]


SOFT = losses(
    SoftTargets={"temperature": 2.0},
    HardLabels={"weight": 0.5},
    HiddenCosine={"layers": {"class_path": f"{LOSSES}.Last"}},
    Embeddings={},
)
TINY = losses(
    # Light, and beside the answers from the start: with weight 1 so narrow a student stayed at chance for 1,000 steps.
    Embeddings={"weight": 0.1, "end": 0.3},
    AttentionMaps={"weight": 0.1, "end": 0.3},
    HiddenMSE={"weight": 0.1, "end": 0.3, "layers": {"class_path": f"{LOSSES}.Last"}},
    SoftTargets={"temperature": 2.0},
    HardLabels={"weight": 0.5},
)


def short(epochs: int, rate: float) -> list[str]:
    """Return fewer passes than the teacher's, and a rate for a narrow model; with a teacher and without one alike."""
    return [f"--trainer.max_epochs={epochs}", f"--model.optimizer.init_args.lr={rate}"]


PARTS = {
    "conll2000": Part(
        "conll2000",
        "conll2000",
        [],
        {
            "DistilBERT's losses": Student("conll2000", encoder(96, 1, 2, 192), SOFT),
            "TinyBERT's losses": Student("tinybert-task"),
        },
    ),
    "movie-reviews": Part(
        "movie-reviews",
        "movie-reviews",
        ["--model.body.init_args.depth=2"],
        {
            "DistilBERT's losses": Student("movie-reviews", [*encoder(32, 1, 2, 64), *short(3, 2e-3)], SOFT),
            "TinyBERT's losses": Student("movie-reviews", [*encoder(10, 1, 2, 32), *short(4, 4e-3)], TINY),
        },
    ),
    "pg19-mini": Part(
        "pg19-mini",
        "pg19-mini",
        [
            *decoder(96, 256),
            "--data.segment=256",
            "--data.eval_tokens=100000",
            "--model.model.init_args.depth=4",
            '--model.model.init_args.memories=[{"class_path":"memtx.RecurrentMemory","init_args":{"window":256}}]',
            "--model.meter=false",
            *steps(800),
        ],
        {"long-to-memory": Student("long-to-memory", [*decoder(96, 256), *steps(500)])},
        # The student's window is 64 positions: beyond it there is its memory alone.
        ["--tokens=8192", "--beyond=64", "--limit=16"],
    ),
}


def report(teacher: Path, students: list[Path], data: Path, part: Part, target: Path) -> dict[str, Any]:
    """Return what `memtx distil report` measures of runs."""
    if not target.exists():
        command = [
            sys.executable, "-m", "memtx", "distil", "report", "--teacher", str(teacher), "--data", str(data),
            *(one for path in students for one in ("--student", str(path))), "--json", str(target), *part.report,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def measured(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure one part with one seed; return a row a model."""
    part, data = PARTS[name], arguments.data / PARTS[name].data
    teacher = arguments.out / f"{name}-teacher-{seed}"
    done = arguments.out / f"{name}-{seed}.json"
    runs = {}
    for student in part.students:
        for how in ("distilled", "alone"):
            called = student.replace("'", "").replace(" ", "-").lower()
            runs[student, how] = arguments.out / f"{name}-{called}-{how}-{seed}"
    if not done.exists():
        short = [f"--trainer.max_steps={arguments.steps}", "--trainer.max_epochs=-1"] if arguments.steps else []
        train(teacher, part.config, data, seed, [*part.settings, *short])
        for (student, how), run in runs.items():
            one = part.students[student]
            learns = distilled(teacher if how == "distilled" else None, one.learns)
            train(run, one.config, data, seed, [*one.settings, *learns, *short])
    found = report(teacher, list(runs.values()), data, part, done)
    rows = [{"part": name, "seed": seed, "model": "teacher", "how": "", **found["teacher"]}]
    for (student, how), figures in zip(runs, found["students"], strict=True):
        rows.append({"part": name, "seed": seed, "model": student, "how": how, **figures})
    return rows


def train(run: Path, config: str, data: Path, seed: int, settings: list[str]) -> None:
    """Train a run, unless it is done."""
    done = run / "done"
    if not done.exists():
        fitted(run, str(HOME / "configs" / f"{config}.yaml"), data, seed, settings)
        done.touch()


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the figures as Markdown, a row a model, seeds side by side."""
    lines = ["| part | model | parameters | smaller | faster | score, seed by seed | kept | against alone |"]
    lines.append("|---" * 8 + "|")
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        for model, how in dict.fromkeys((row["model"], row["how"]) for row in own):
            of = sorted((row for row in own if (row["model"], row["how"]) == (model, how)), key=lambda row: row["seed"])
            scores = ", ".join(f"{row['score']:.3f}" for row in of)
            shares = ["", "", ""]
            gains = ""
            if model != "teacher":
                shares = [f"{statistics.mean(row[key] for row in of):.0%}" for key in ("smaller", "faster", "kept")]
            if how == "distilled":
                alone = {row["seed"]: row["score"] for row in own if (row["model"], row["how"]) == (model, "alone")}
                gains = ", ".join(f"{row['score'] - alone[row['seed']]:+.3f}" for row in of)
            called = f"{model}, {how}" if how else model
            lines.append(
                f"| {part}, {of[0]['measure'].replace('_', ' ')} | {called} | {of[0]['parameters']:,} | {shares[0]} | "
                f"{shares[1]} | {scores} | {shares[2]} | {gains} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds a folder for each part")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="instead of the configs'")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with measuring.progress() as bar:
        # Seed by seed, so that a comparison that is stopped has whole seeds.
        jobs = [(part, seed) for seed in arguments.seeds for part in arguments.parts]
        for part, seed in bar.track(jobs, description="teachers and students"):
            rows += measured(part, seed, arguments)
            lines = table(rows)
            (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
            found = {"machine": measuring.machine(torch.device("cpu")), "rows": rows}
            (arguments.out / "results.json").write_text(json.dumps(found, indent=2))
    for part in arguments.parts:
        own = [row for row in rows if row["part"] == part]
        scores: dict[str, list[float]] = {}
        for row in own:
            scores.setdefault(f"{row['model']}, {row['how']}" if row["how"] else row["model"], []).append(row["score"])
        measure = own[0]["measure"]
        plots.comparison(
            arguments.out / f"{part}.png",
            scores,
            title=f"{part}: students with and without their teacher",
            unit=measure.replace("_", " "),
            lower_is_better=measure == "bits_per_byte",
        )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
