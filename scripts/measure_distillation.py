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
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmarking
import torch
from training_runs import last_value, read_metrics, run_fit, run_memtx

import memtx
from memtx import plots
from memtx.evaluation.compare import num_parameters

LOSSES_MODULE = "memtx.training.distillation"


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


TOKENIZER = "{{class_path: memtx.data.hf_tokenizers.{}, init_args: {{{}}}}}"
TEACHER_DEPTH, TEACHER_DIM = 4, 64
CPU_SECONDS = ("--trainer.callbacks+=training_runs.CpuSeconds", "--trainer.log_every_n_steps=20")
MASKED_STEPS, STUDENT_STEPS, GENERAL_STEPS, TASK_EPOCHS = 1500, 400, 800, 23


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


def count_equal_steps(steps: int, distilled: Path, control: Path) -> int:
    """Return the steps of a control that take as long as a distilled run, whose ``steps`` the control has had too."""
    seconds = [last_value(read_metrics(run), "cpu_seconds") for run in (distilled, control)]
    return round(steps * seconds[0] / seconds[1])


def train_distilbert(seed: int, arguments: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Train students by the recipe of DistilBERT; return the runs."""
    teacher, stories = train_masked_teacher(seed, arguments)
    runs, steps = {("teacher", ""): teacher}, arguments.steps or STUDENT_STEPS
    for training in ("distilled", "initialized", "initialized, equal time", "alone"):
        run_dir = arguments.output_dir / f"distilbert-{training.replace(', ', '-').replace(' ', '-')}-{seed}"
        count = steps
        if training.endswith("time"):
            count = count_equal_steps(
                steps, *(runs["half of the layers", name] for name in ("distilled", "initialized"))
            )
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
        run_dir, count = folder / f"tinybert-{training.replace(', ', '-').replace(' ', '-')}-{seed}", steps
        if training.endswith("time"):
            count = count_equal_steps(
                steps, *(runs["half of layers and width", name] for name in ("distilled", "initialized"))
            )
            options = [*options, *one_decay(count)]
        train(run_dir, "tinybert-task", data, seed, [*task_options(count), *options])
        runs["half of layers and width", training] = run_dir
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
