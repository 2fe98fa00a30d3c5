"""``memtx evaluate``: accuracy of a memory by distance, compared with chance, and its capacity."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli import options
from memtx.errors import CheckpointError, MemtxError

if TYPE_CHECKING:
    from memtx.data.synthetic_tasks.base import SyntheticTask
    from memtx.evaluation.accuracy import EvaluationResult
    from memtx.models.memory_transformer import MemoryTransformer

SYNTHETIC_TASKS = ("recall", "capacity", "overwrite", "copy", "tracking")
HAYSTACK_TASKS = ("needle", "babi")
DEFAULT_DISTANCES = "1k,4k,16k"
DEFAULT_CAPACITY_SEGMENTS = (3, 32)
DEFAULT_NUM_SAMPLES = {"needle": 8, "babi": 16}
MAX_DISTANCE = 10**9
_UNIT_FACTORS = {"": 1, "k": 10**3, "m": 10**6}


def parse_distances(text: str) -> list[int]:
    """Parse distances such as ``1k,8k,64k`` into sorted numbers of tokens without duplicates, or raise MemtxError."""
    distances = set()
    for entry in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kKmM]?)", entry)
        value = round(float(match[1]) * _UNIT_FACTORS[match[2].lower()]) if match else 0
        if not 1 <= value <= MAX_DISTANCE:
            message = f"--distances has '{entry}', expected tokens from 1 to {MAX_DISTANCE:,}."
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


def _evaluate_haystack(arguments: argparse.Namespace, distances: list[int]) -> list[EvaluationResult]:
    from memtx.data.sources.base import SPLITS
    from memtx.evaluation.accuracy import average_by_distance
    from memtx.evaluation.babi import evaluate_babi, load_tasks
    from memtx.evaluation.haystack import Haystack, evaluate_needle

    tasks = load_tasks(arguments.babi_dir) if arguments.task == "babi" else {}
    splits = options.open_corpus(arguments.haystack).split_parts
    if Path(arguments.haystack).is_file():
        documents = [document for split in SPLITS for document in splits.get(split, ())]
    else:
        # The test texts, if any, because the model was not trained on them.
        documents = next((list(splits[split]) for split in reversed(SPLITS) if splits.get(split)), [])
    model, tokenizer = options.load_model(arguments)
    haystack = Haystack(documents, tokenizer)
    settings = {name: getattr(arguments, name) for name in ("num_samples", "seed", "segment_length")}
    with options.progress_bar("evaluating", (sum(distances) + len(distances)) * max(1, len(tasks))) as advance:
        settings["on_progress"] = advance
        if arguments.task == "babi":
            results = evaluate_babi(model, tokenizer, haystack, tasks, distances, **settings)
        else:
            num_depths = arguments.num_depths
            results = evaluate_needle(model, tokenizer, haystack, distances, num_depths=num_depths, **settings)
    return [*results, *average_by_distance("all", results)]


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
    if task == "babi" and arguments.babi_dir is None:
        raise MemtxError("--babi-dir is not set, expected the folder of the bAbI tasks.", "Add --babi-dir FOLDER.")
    if arguments.num_samples is None:
        arguments.num_samples = DEFAULT_NUM_SAMPLES.get(task, 32)
    distances = parse_distances(DEFAULT_DISTANCES if arguments.distances is None else arguments.distances)
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
        "tasks for models trained on them (configs/recall.yaml); needle and babi hide sentences in a book and are for "
        "language models.",
    )
    add = parser.add_argument
    parser.add_model_options(window=True)
    add("--task", required=True, choices=(*SYNTHETIC_TASKS, *HAYSTACK_TASKS), help="task to evaluate")
    text = "tokens (k = 1,000, M = 1,000,000) between a fact and its question, rounded to segments; for needle and "
    text += f"babi the length of the whole context (default: {DEFAULT_DISTANCES}; for capacity 3 and 32 segments)"
    add("--distances", metavar="N,...", help=text)
    text = "size of a synthetic task, such as num_pairs=8; defaults to the size in training; repeatable"
    add("--task-arg", action="append", default=[], metavar="NAME=N", help=text)
    add("--num-samples", type=options.positive_int, help="samples per distance (default: 32; needle: 8; babi: 16)")
    add("--seed", type=options.non_negative_int, default=0, help="random seed of the questions")
    parser.add_output_options("accuracy by distance")
    add("--haystack", default="embedded", help="text to hide facts in: a file, or a folder's test texts")
    add("--num-depths", type=int, default=8, help="needles per context")
    add("--babi-dir", metavar="FOLDER", help="folder of the bAbI tasks, with files like qa1_..._test.txt")
    return parser.run(argv, _evaluate)
