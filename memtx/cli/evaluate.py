"""``memtx evaluate``: what a memory keeps, as accuracy by distance beside that of guessing."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli.options import Parser, check_output_path, progress_bar, run
from memtx.cli.read import (
    add_checkpoint_option,
    add_device_options,
    import_modules,
    load_model,
    resolve_device,
    suggest_import_option,
)
from memtx.errors import CheckpointError, MemtxError

if TYPE_CHECKING:
    from memtx.data.synthetic_tasks.base import SyntheticTask
    from memtx.evaluation.accuracy import Capacity, EvaluationResult
    from memtx.models.memory_transformer import MemoryTransformer

SYNTHETIC_TASKS = ("recall", "capacity", "overwrite", "copy", "tracking")
HAYSTACK_TASKS = ("needle", "babi")
DEFAULT_DISTANCES = "1k,4k,16k"
DEFAULT_CAPACITY_SEGMENTS = (3, 32)
"""Where a capacity is measured when no distance is given."""
DEFAULT_NUM_SAMPLES = {"needle": 8, "babi": 16}
MAX_DISTANCE = 10**9

_UNIT_FACTORS = {"": 1, "k": 10**3, "m": 10**6}


def _build_parser() -> Parser:
    parser = Parser(
        "memtx evaluate",
        "Measure what a memory keeps. recall, capacity, overwrite, copy and tracking are drawn tasks, for models that "
        "were trained on them (configs/recall.yaml); needle and babi hide sentences in a book, for language models.",
    )
    add_checkpoint_option(parser)
    parser.add_argument("--task", required=True, choices=(*SYNTHETIC_TASKS, *HAYSTACK_TASKS), help="what is asked")
    parser.add_argument(
        "--distances",
        metavar="N,...",
        help="tokens (k = 1,000, M = 1,000,000) from what is asked about to the question, rounded to segments; for "
        f"needle and babi tokens of the whole context (default: {DEFAULT_DISTANCES}; for capacity 3 and 32 segments)",
    )
    parser.add_argument(
        "--task-arg",
        action="append",
        default=[],
        metavar="NAME=N",
        help="a size of a drawn task, such as num_pairs=8; those the run was trained with by default; repeatable",
    )
    parser.add_argument(
        "--num-samples", type=int, help="episodes or contexts of a distance (default: 32; needle 8, babi 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds ask the same")
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy by distance")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, or - to print them instead")
    parser.add_argument(
        "--haystack", default="embedded", help="where sentences are hidden: a file, or a folder's test texts"
    )
    parser.add_argument("--num-depths", type=int, default=8, help="needles in a context")
    parser.add_argument("--babi-dir", metavar="FOLDER", help="bAbI's tasks, files such as qa1_..._test.txt")
    parser.add_argument("--segment-length", type=int, default=512, help="tokens read at once by needle and babi")
    add_device_options(parser)
    return parser


def parse_distances(text: str) -> list[int]:
    """Return the numbers of tokens that ``1k,8k,64k`` names, ascending, each once.

    Raises:
        MemtxError: one that is no number, or below 1.
    """
    found = set()
    for one in text.split(","):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)([kKmM]?)\s*", one)
        value = round(float(parts[1]) * _UNIT_FACTORS[parts[2].lower()]) if parts else 0
        if not 1 <= value <= MAX_DISTANCE:
            raise MemtxError(
                f"--distances has '{one.strip()}', expected tokens from 1 to {MAX_DISTANCE:,}.",
                "Such as 1k,8k,64k or 1M.",
            )
        found.add(value)
    return sorted(found)


def _parse_task_args(assignments: list[str]) -> dict[str, str]:
    for one in assignments:
        if "=" not in one:
            raise MemtxError(f"--task-arg {one} names no number.", "Such as --task-arg num_pairs=8.")
    return {name.strip(): value.strip() for name, _, value in (one.partition("=") for one in assignments)}


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    for name, least in (("num_samples", 1), ("segment_length", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**63:
            raise MemtxError(f"--{name.replace('_', '-')} is {value}, expected at least {least}.")
    for option in ("plot", "json"):
        target = getattr(arguments, option)
        if target is None or (option == "json" and target == "-"):
            continue
        check_output_path(option, target)
    if arguments.task_arg and arguments.task in HAYSTACK_TASKS:
        raise MemtxError(f"--task-arg is of drawn tasks, and {arguments.task} is none.", "Leave it out.")
    if arguments.task == "babi" and arguments.babi_dir is None:
        raise MemtxError("--babi-dir is not given, expected the folder of bAbI's tasks.", "Add --babi-dir FOLDER.")


def _load_model_and_task(arguments: argparse.Namespace) -> tuple[MemoryTransformer, SyntheticTask]:
    """Return the model and the task it is to be asked."""
    import_modules(arguments.modules)
    device = resolve_device(arguments.device)
    import torch

    from memtx.data.synthetic_tasks.copying import SelectiveCopying
    from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
    from memtx.data.synthetic_tasks.tracking import StateTracking
    from memtx.evaluation.accuracy import build_task, load_model_and_task_options

    kinds: dict[str, type[SyntheticTask]] = {
        "recall": AssociativeRecall,
        "capacity": AssociativeRecall,
        "overwrite": Overwrite,
        "copy": SelectiveCopying,
        "tracking": StateTracking,
    }
    with suggest_import_option():
        model, trained = load_model_and_task_options(arguments.checkpoint)
    task = build_task(kinds[arguments.task], trained, _parse_task_args(arguments.task_arg))
    if task.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"'{arguments.checkpoint}' has a vocabulary of {model.vocab_size}, {arguments.task} of these sizes one of "
            f"{task.vocab_size}.",
            "Give a model trained on it (configs/recall.yaml), or its task's sizes by --task-arg.",
        )
    model.to(device=device, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None)
    return model, task


def _evaluate_synthetic(
    arguments: argparse.Namespace, distances: list[int], num_samples: int
) -> list[EvaluationResult]:
    from memtx.evaluation.accuracy import EvaluationResult, evaluate_accuracy

    model, task = _load_model_and_task(arguments)
    segments = sorted({max(1, round(distance / task.segment_length)) for distance in distances})
    results = []
    with progress_bar("evaluating", sum(task.num_write_segments + one for one in segments)) as watch:
        for one in segments:
            share = evaluate_accuracy(model, task, one, num_samples=num_samples, seed=arguments.seed, on_progress=watch)
            results.append(EvaluationResult(arguments.task, one * task.segment_length, share, task.chance_accuracy))
    return results


def _measure_capacities(arguments: argparse.Namespace, num_samples: int) -> tuple[list[Capacity], SyntheticTask]:
    from memtx.data.synthetic_tasks.recall import AssociativeRecall
    from memtx.evaluation.accuracy import evaluate_capacity

    model, task = _load_model_and_task(arguments)
    assert isinstance(task, AssociativeRecall)
    asked = parse_distances(arguments.distances) if arguments.distances is not None else []
    segments = sorted({max(1, round(one / task.segment_length)) for one in asked}) or list(DEFAULT_CAPACITY_SEGMENTS)
    size = model.init_state(1).nbytes
    with progress_bar("evaluating", None) as watch:
        found = [
            evaluate_capacity(
                model,
                task,
                one,
                state_bytes=size,
                num_samples=num_samples,
                seed=arguments.seed,
                on_progress=lambda _: watch(1),
            )
            for one in segments
        ]
    return found, task


def _evaluate_haystack(arguments: argparse.Namespace, distances: list[int], num_samples: int) -> list[EvaluationResult]:
    from memtx.data.sources.base import SPLITS
    from memtx.data.sources.corpus import open_corpus
    from memtx.evaluation.babi import evaluate_babi, load_tasks
    from memtx.evaluation.haystack import Haystack, evaluate_needle

    tasks = load_tasks(arguments.babi_dir) if arguments.task == "babi" else {}
    splits = open_corpus(arguments.haystack).split_parts
    if Path(arguments.haystack).is_file():
        documents = [part for name in SPLITS for part in splits.get(name, ())]
    else:
        # Of texts that the model was not trained on, where they say so.
        documents = next((list(splits[name]) for name in reversed(SPLITS) if splits.get(name)), [])
    model, tokenizer = load_model(arguments)
    haystack = Haystack(documents, tokenizer)
    common = {"num_samples": num_samples, "seed": arguments.seed, "segment_length": arguments.segment_length}
    with progress_bar("evaluating", (sum(distances) + len(distances)) * max(1, len(tasks))) as watch:
        if arguments.task == "babi":
            found = evaluate_babi(model, tokenizer, haystack, tasks, distances, on_progress=watch, **common)
        else:
            found = evaluate_needle(
                model, tokenizer, haystack, distances, num_depths=arguments.num_depths, on_progress=watch, **common
            )
    return [*found, *average_by_distance("all", found)]


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number else "right")
    for line in rows:
        table.add_row(*line)
    # Not as the table's title, which is wrapped to its width.
    sys.stdout.write(f"{title}\n")
    Console().print(table)


def _format_accuracy(value: float | None) -> str:
    return "too long" if value is None else f"{value:.3f}"


def _print_results(task: str, results: list[EvaluationResult]) -> None:
    """Print a row a distance where there is one condition, else a row a condition and a column a distance."""
    names = list(dict.fromkeys(one.name for one in results))
    if len(names) == 1:
        lines = [[f"{one.distance:,}", _format_accuracy(one.accuracy), f"{one.chance:.3f}"] for one in results]
        _print_table(f"{task}: accuracy by distance", ["tokens", "accuracy", "chance"], lines)
        return
    asked = list(dict.fromkeys(one.distance for one in results))
    lines = []
    for name in names:
        own = [one for one in results if one.name == name]
        lines.append([name, *(_format_accuracy(one.accuracy) for one in own), f"{own[0].chance:.3f}"])
    _print_table(f"{task}: accuracy by tokens of the context", ["", *(f"{one:,}" for one in asked), "chance"], lines)


def _plot(path: str, task: str, results: list[EvaluationResult]) -> None:
    from memtx import plots

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for one in results:
        if one.accuracy is not None:
            places, shares = curves.setdefault(one.name, ([], []))
            places.append(one.distance)
            shares.append(one.accuracy)
    chance = sum(one.chance for one in results) / len(results)
    axis = "tokens of the context" if task in HAYSTACK_TASKS else "distance (tokens)"
    plots.plot_accuracy(path, curves, chance_level=chance, title=task, x_label=axis)


def _write_json(path: str | None, results: dict[str, Any]) -> None:
    if path == "-":
        sys.stdout.write(json.dumps(results) + "\n")
    elif path is not None:
        from memtx import files

        files.write_json(path, results)


def _evaluate(arguments: argparse.Namespace) -> None:
    _check_arguments(arguments)
    asked = parse_distances(arguments.distances if arguments.distances is not None else DEFAULT_DISTANCES)
    rows = arguments.num_samples if arguments.num_samples is not None else DEFAULT_NUM_SAMPLES.get(arguments.task, 32)
    facts = {"task": arguments.task, "checkpoint": arguments.checkpoint, "num_samples": rows, "seed": arguments.seed}
    if arguments.task == "capacity":
        _evaluate_capacity(arguments, facts)
        return
    results = (_evaluate_haystack if arguments.task in HAYSTACK_TASKS else _evaluate_synthetic)(arguments, asked, rows)
    if arguments.json != "-":
        _print_results(arguments.task, results)
    if arguments.plot:
        _plot(arguments.plot, arguments.task, results)
    _write_json(arguments.json, {**facts, "results": [vars(one) for one in results]})


def _evaluate_capacity(arguments: argparse.Namespace, metadata: dict[str, Any]) -> None:
    found, task = _measure_capacities(arguments, metadata["num_samples"])
    if arguments.json != "-":
        lines = [
            [
                f"{one.distance:,}",
                f"{one.distance * task.segment_length:,}",
                f"{'at least ' * one.is_lower_bound}{one.num_pairs}",
                f"{one.state_bytes / 1024:,.1f}",
                f"{one.pairs_per_kib:.3f}",
            ]
            for one in found
        ]
        _print_table(
            "capacity: pairs recalled with an accuracy of 0.9",
            ["segments", "tokens", "pairs", "state KiB", "pairs per KiB"],
            lines,
        )
    if arguments.plot:
        from memtx import plots

        curves = {
            f"{one.distance} segments": (list(one.accuracy_by_pairs), list(one.accuracy_by_pairs.values()))
            for one in found
        }
        plots.plot_accuracy(
            arguments.plot, curves, chance_level=task.chance_accuracy, title="capacity", x_label="pairs"
        )
    results = [{**vars(one), "pairs_per_kib": one.pairs_per_kib} for one in found]
    _write_json(arguments.json, {**metadata, "chance": task.chance_accuracy, "results": results})


def main(argv: list[str]) -> int:
    """Run ``memtx evaluate`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _evaluate(arguments), traceback=arguments.traceback)
