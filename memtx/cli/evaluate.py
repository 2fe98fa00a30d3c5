"""``memtx evaluate``: accuracy of a memory by distance, compared with chance, and its capacity."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli import options
from memtx.errors import CheckpointError, MemtxError, closest_match

if TYPE_CHECKING:
    from memtx.data.sources.base import Document
    from memtx.data.synthetic_tasks.base import SyntheticTask
    from memtx.evaluation.accuracy import EvaluationResult
    from memtx.models.memory_transformer import MemoryTransformer

SYNTHETIC_TASKS = ("recall", "capacity", "overwrite", "copy", "tracking")
HAYSTACK_TASKS = ("needle", "babi", "babilong", "ruler")
BABI_TASKS = ("babi", "babilong")
DEFAULT_DISTANCES = "1k,4k,16k"
DEFAULT_CAPACITY_SEGMENTS = (3, 32)
DEFAULT_NUM_SAMPLES = {"needle": 8, "babi": 16, "babilong": 16, "ruler": 8}
MAX_DISTANCE = 10**9
_UNIT_FACTORS = {"": 1, "k": 10**3, "m": 10**6}


def parse_distances(text: str, minimum: int = 1) -> list[int]:
    """Parse distances such as ``1k,8k,64k`` into sorted numbers of tokens without duplicates, or raise MemtxError."""
    distances = set()
    for entry in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kKmM]?)", entry)
        value = round(float(match[1]) * _UNIT_FACTORS[match[2].lower()]) if match else -1
        if not minimum <= value <= MAX_DISTANCE:
            message = f"--distances has '{entry}', expected tokens from {minimum} to {MAX_DISTANCE:,}."
            raise MemtxError(message, "Give a list such as 1k,8k,64k or 1M.")
        distances.add(value)
    return sorted(distances)


def _parse_task_args(assignments: list[str]) -> dict[str, str]:
    values = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise MemtxError(f"--task-arg {assignment} has no value.", "Write it as --task-arg num_pairs=8.")
        values[name.strip()] = value.strip()
    return values


def _load_model_and_task(arguments: argparse.Namespace) -> tuple[MemoryTransformer, SyntheticTask]:
    placement = options.get_placement(arguments)
    from memtx.data.synthetic_tasks.copying import SelectiveCopying
    from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
    from memtx.data.synthetic_tasks.tracking import StateTracking
    from memtx.evaluation.accuracy import build_task, load_model_and_task_options

    task_classes: dict[str, type[SyntheticTask]]
    task_classes = {"overwrite": Overwrite, "copy": SelectiveCopying, "tracking": StateTracking}
    task_class = task_classes.get(arguments.task, AssociativeRecall)  # for recall and capacity
    with options.user_modules(arguments.modules):
        model, trained_options = load_model_and_task_options(arguments.checkpoint)
    task = build_task(task_class, trained_options, _parse_task_args(arguments.task_arg))
    if task.vocab_size != model.vocab_size:
        other = f"that of {arguments.task} with these sizes ({task.vocab_size})"
        message = f"The vocabulary of '{arguments.checkpoint}' ({model.vocab_size}) differs from {other}."
        hint = "Give a model trained on this task (configs/recall.yaml), or set its sizes with --task-arg."
        raise CheckpointError(message, hint)
    return model.to(**placement), task


def _evaluate_synthetic(arguments: argparse.Namespace, distances: list[int]) -> list[EvaluationResult]:
    from memtx.evaluation.accuracy import EvaluationResult, evaluate_accuracy

    model, task = _load_model_and_task(arguments)
    segments = _to_segments(distances, task)
    settings = {"num_samples": arguments.num_samples, "seed": arguments.seed}
    with options.progress_bar("evaluating", sum(task.num_write_segments + count for count in segments)) as advance:
        accuracies = [evaluate_accuracy(model, task, count, on_progress=advance, **settings) for count in segments]
    pairs = [(count * task.segment_length, accuracy) for count, accuracy in zip(segments, accuracies, strict=True)]
    return [EvaluationResult(arguments.task, *pair, task.chance_accuracy) for pair in pairs]


def _to_segments(distances: Iterable[int], task: SyntheticTask) -> list[int]:
    return sorted({max(1, round(distance / task.segment_length)) for distance in distances})


def _read_documents(root: str) -> list[Document]:
    """Return all documents of a file, or those of a folder's test texts, which the model was not trained on."""
    from memtx.data.sources.base import SPLITS

    splits = options.open_corpus(root).split_parts
    if Path(root).is_file():
        return [document for split in SPLITS for document in splits.get(split, ())]
    return next((list(splits[split]) for split in reversed(SPLITS) if splits.get(split)), [])


def _select(names: str | None, available: Sequence[str]) -> list[str]:
    """Return the tasks of ``--tasks``, in their order; all without it."""
    selected = [name.strip() for name in names.split(",")] if names else list(available)
    for name in selected:
        if name not in available:
            message = f"--tasks has '{name}', expected some of {', '.join(available)}.{closest_match(name, available)}"
            raise MemtxError(message, "Change --tasks.")
    return list(dict.fromkeys(selected))


def _evaluate_haystack(arguments: argparse.Namespace, distances: list[int]) -> list[EvaluationResult]:
    from memtx.evaluation.accuracy import average_by_distance

    evaluate = _evaluate_ruler if arguments.task == "ruler" else _evaluate_hidden_sentences
    results = evaluate(arguments, distances)
    return [*results, *average_by_distance("all", results)]


def _evaluate_hidden_sentences(arguments: argparse.Namespace, distances: list[int]) -> list[EvaluationResult]:
    from memtx.data.babi import load_tasks
    from memtx.data.haystack import Haystack
    from memtx.evaluation.babi import evaluate_babi
    from memtx.evaluation.babilong import evaluate_babilong, load_prompts
    from memtx.evaluation.haystack import evaluate_needle

    tasks = load_tasks(arguments.babi_dir) if arguments.task in BABI_TASKS else {}
    if tasks:
        names = _select(arguments.tasks, [f"qa{number}" for number in tasks])
        tasks = {number: tasks[number] for number in tasks if f"qa{number}" in names}
    prompts = load_prompts(arguments.prompts) if arguments.prompts is not None else None
    documents = _read_documents(arguments.haystack)
    model, tokenizer = options.load_model(arguments)
    haystack = Haystack(documents, tokenizer)
    settings = {name: getattr(arguments, name) for name in ("num_samples", "seed", "segment_length")}
    with options.progress_bar("evaluating", (sum(distances) + len(distances)) * max(1, len(tasks))) as advance:
        settings["on_progress"] = advance
        if arguments.task == "babilong":
            return evaluate_babilong(model, tokenizer, haystack, tasks, distances, prompts=prompts, **settings)
        if arguments.task == "babi":
            return evaluate_babi(model, tokenizer, haystack, tasks, distances, **settings)
        num_depths = arguments.num_depths
        return evaluate_needle(model, tokenizer, haystack, distances, num_depths=num_depths, **settings)


def _evaluate_ruler(arguments: argparse.Namespace, distances: list[int]) -> list[EvaluationResult]:
    from memtx.evaluation.ruler import QUESTION_TASKS, evaluate_ruler, read_haystack, read_questions
    from memtx.evaluation.ruler_prompts import RULER_TASKS

    names = _select(arguments.tasks, list(RULER_TASKS))
    texts = {}
    for name in names:
        if (option := QUESTION_TASKS.get(name)) is None:
            continue
        if (path := getattr(arguments, option)) is not None:
            texts[name] = read_questions(path)
        elif arguments.tasks is not None:
            raise MemtxError(f"--{option} is not set, expected the file of {name}.", f"Add --{option} FILE.")
        else:
            sys.stderr.write(f"memtx: {name} is left out: it needs --{option} FILE\n")
    if any(name not in QUESTION_TASKS for name in names):
        haystack = read_haystack(_read_documents(arguments.haystack))
        texts |= {name: haystack for name in names if name not in QUESTION_TASKS}
    texts = {name: texts[name] for name in names if name in texts}
    model, tokenizer = options.load_model(arguments)
    settings = {name: getattr(arguments, name) for name in ("num_samples", "seed", "segment_length")}
    total = sum(distances) * len(texts) * arguments.num_samples
    with options.progress_bar("evaluating", total) as advance:
        return evaluate_ruler(model, tokenizer, texts, distances, on_progress=advance, **settings)


@dataclass
class _Report:
    """Results as a table, as curves ``name -> (x values, accuracies)`` and as JSON fields."""

    title: str
    columns: list[str]
    cells: list[list[str]]
    curves: dict[str, tuple[list[int], list[float]]]
    chance: float
    x_label: str
    fields: dict[str, Any]


def _report_accuracies(task: str, results: list[EvaluationResult]) -> _Report:
    """Return a line per distance for a single condition, else a line per condition and a column per distance."""
    names = dict.fromkeys(result.name for result in results)
    groups = {name: [result for result in results if result.name == name] for name in names}
    texts = {result: "too long" if result.accuracy is None else f"{result.accuracy:.3f}" for result in results}
    if len(groups) == 1:
        title, columns = "accuracy by distance", ["tokens", "accuracy", "chance"]
        cells = [[f"{result.distance:,}", texts[result], f"{result.chance:.3f}"] for result in results]
    else:
        title = "accuracy by length of the context in tokens"
        columns = ["", *(f"{result.distance:,}" for result in next(iter(groups.values()))), "chance"]
        cells = [[name, *map(texts.__getitem__, group), f"{group[0].chance:.3f}"] for name, group in groups.items()]
    curves = {}
    for name, group in groups.items():
        if points := [(result.distance, result.accuracy) for result in group if result.accuracy is not None]:
            curves[name] = ([distance for distance, _ in points], [accuracy for _, accuracy in points])
    chance = sum(result.chance for result in results) / len(results)
    x_label = "context length (tokens)" if task in HAYSTACK_TASKS else "distance (tokens)"
    return _Report(title, columns, cells, curves, chance, x_label, {"results": [vars(result) for result in results]})


def _evaluate_capacity(arguments: argparse.Namespace, distances: list[int]) -> _Report:
    from memtx.data.synthetic_tasks.recall import AssociativeRecall
    from memtx.evaluation.accuracy import ACCURACY_THRESHOLD, evaluate_capacity

    model, task = _load_model_and_task(arguments)
    assert isinstance(task, AssociativeRecall)
    state_bytes = model.init_state(1).nbytes
    settings = {"state_bytes": state_bytes, "num_samples": arguments.num_samples, "seed": arguments.seed}
    cells, curves, results = [], {}, []
    with options.progress_bar("evaluating", None) as advance:
        for segments in _to_segments(distances, task) or DEFAULT_CAPACITY_SEGMENTS:
            capacity = evaluate_capacity(model, task, segments, on_progress=lambda _: advance(1), **settings)
            num_pairs = f"{'at least ' * capacity.is_lower_bound}{capacity.num_pairs}"
            distance, state_kib = f"{segments * task.segment_length:,}", f"{state_bytes / 1024:,.1f}"
            cells.append([f"{segments:,}", distance, num_pairs, state_kib, f"{capacity.pairs_per_kib:.3f}"])
            accuracies = capacity.accuracy_by_pairs
            curves[f"{segments} segments"] = (list(accuracies), list(accuracies.values()))
            results.append({**vars(capacity), "pairs_per_kib": capacity.pairs_per_kib})
    title = f"pairs recalled with an accuracy of {ACCURACY_THRESHOLD}"
    columns = ["segments", "tokens", "pairs", "state KiB", "pairs per KiB"]
    fields = {"chance": task.chance_accuracy, "results": results}
    return _Report(title, columns, cells, curves, task.chance_accuracy, "pairs", fields)


def _evaluate(arguments: argparse.Namespace) -> None:
    task: str = arguments.task
    if arguments.task_arg and task in HAYSTACK_TASKS:
        raise MemtxError(f"--task-arg does not apply to {task}.", "Remove --task-arg.")
    if arguments.window is not None and task not in HAYSTACK_TASKS:
        raise MemtxError(f"--window does not apply to {task}.", "Remove --window.")
    for option, tasks in (("tasks", (*BABI_TASKS, "ruler")), ("prompts", ("babilong",))):
        if getattr(arguments, option) is not None and task not in tasks:
            raise MemtxError(f"--{option} does not apply to {task}.", f"Remove --{option}.")
    if task in BABI_TASKS and arguments.babi_dir is None:
        raise MemtxError("--babi-dir is not set, expected the folder of the bAbI tasks.", "Add --babi-dir FOLDER.")
    if arguments.num_samples is None:
        arguments.num_samples = DEFAULT_NUM_SAMPLES.get(task, 32)
    # A context of 0 tokens holds the facts alone.
    minimum = 0 if task == "babilong" else 1
    distances = parse_distances(DEFAULT_DISTANCES if arguments.distances is None else arguments.distances, minimum)
    if task == "capacity":
        report = _evaluate_capacity(arguments, distances if arguments.distances is not None else [])
    else:
        evaluate = _evaluate_haystack if task in HAYSTACK_TASKS else _evaluate_synthetic
        report = _report_accuracies(task, evaluate(arguments, distances))
    if arguments.json != "-":
        sys.stdout.write(f"{task}: {report.title}\n")  # not as the title of the table, where it would be wrapped
        options.print_table(report.columns, report.cells)
    if arguments.plot:
        from memtx.plots import plot_accuracy

        plot_accuracy(arguments.plot, report.curves, chance_level=report.chance, title=task, x_label=report.x_label)
    settings = {name: getattr(arguments, name) for name in ("task", "checkpoint", "num_samples", "seed")}
    options.write_json_output(arguments.json, {**settings, **report.fields})
    words = ("evaluate", *arguments.argv, "--plot", f"{task}.png")
    if not arguments.plot:
        options.print_next_command("Plot it with", *words, is_data=arguments.json == "-")


def main(argv: list[str]) -> int:
    """Run ``memtx evaluate``."""
    parser = options.Parser(
        "memtx evaluate",
        "Measure the accuracy of a memory by distance. recall, capacity, overwrite, copy and tracking are synthetic "
        "tasks for models trained on them (configs/recall.yaml); needle, babi and babilong hide sentences in a book, "
        "and ruler has 13 tasks of its own; they are for language models. babi chooses among the answers by "
        "likelihood; babilong and ruler score what the model writes.",
    )
    add = parser.add_argument
    parser.add_model_options(window=True)
    add("--task", required=True, choices=(*SYNTHETIC_TASKS, *HAYSTACK_TASKS), help="task to evaluate")
    text = "tokens (k = 1,000, M = 1,000,000) between a fact and its question, rounded to segments; for needle, babi, "
    text += "babilong (0 for the facts alone) and ruler the length of the whole context "
    text += f"(default: {DEFAULT_DISTANCES}; for capacity 3 and 32 segments)"
    add("--distances", metavar="N,...", help=text)
    text = "size of a synthetic task, such as num_pairs=8; defaults to the size in training; repeatable"
    add("--task-arg", action="append", default=[], metavar="NAME=N", help=text)
    add(
        "--num-samples",
        type=options.positive_int,
        help="samples per distance (default: 32; needle, ruler: 8; babi, babilong: 16)",
    )
    add("--seed", type=options.non_negative_int, default=0, help="random seed of the questions")
    parser.add_output_options("accuracy by distance")
    add("--haystack", default="embedded", help="text to hide facts in: a file, or a folder's test texts")
    add("--num-depths", type=int, default=8, help="needles per context")
    add("--babi-dir", metavar="FOLDER", help="folder of the bAbI tasks, with files like qa1_..._test.txt")
    add("--tasks", metavar="NAME,...", help="tasks of babi, babilong (qa1,qa2) or ruler (vt,cwe) (default: all)")
    text = "prompts of babilong as a JSON file of the benchmark's instruction, examples and post_prompt by task "
    add("--prompts", metavar="FILE", help=text + "(default: context and question alone)")
    add("--squad", metavar="FILE", help="questions of ruler's qa_1: SQuAD's JSON or JSON lines")
    add("--hotpotqa", metavar="FILE", help="questions of ruler's qa_2: HotpotQA's JSON")
    return parser.run(argv, _evaluate)
