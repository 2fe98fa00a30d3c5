"""``memtx evaluate``: what a memory keeps, as accuracy by distance beside that of guessing."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtx.cli.common import Parser, check_target, progress, run
from memtx.cli.read import add_checkpoint, add_device, hinting_import, import_modules, open_model, placed
from memtx.errors import CheckpointError, MemtxError

if TYPE_CHECKING:
    from memtx.data.episodes.base import Task
    from memtx.evaluation.capacity import Capacity
    from memtx.evaluation.haystack import Haystack
    from memtx.evaluation.measured import Measured
    from memtx.models.memory_transformer import MemoryTransformer

DRAWN = ("recall", "capacity", "overwrite", "copy", "tracking")
HIDDEN = ("needle", "babi")
DISTANCES = "1k,4k,16k"
CAPACITY_SEGMENTS = (3, 32)
"""Where a capacity is measured when no distance is given."""
ROWS = {"needle": 8, "babi": 16}
FARTHEST = 10**9

_UNITS = {"": 1, "k": 10**3, "m": 10**6}


def _parser() -> Parser:
    parser = Parser(
        "memtx evaluate",
        "Measure what a memory keeps. recall, capacity, overwrite, copy and tracking are drawn tasks, for models that "
        "were trained on them (configs/recall.yaml); needle and babi hide sentences in a book, for language models.",
    )
    add_checkpoint(parser)
    parser.add_argument("--task", required=True, choices=(*DRAWN, *HIDDEN), help="what is asked")
    parser.add_argument(
        "--distance",
        metavar="N,...",
        help="tokens (k = 1,000, M = 1,000,000) from what is asked about to the question, rounded to segments; for "
        f"needle and babi tokens of the whole context (default: {DISTANCES}; for capacity 3 and 32 segments)",
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="NAME=N",
        help="a size of a drawn task, such as pairs=8; those the run was trained with by default; repeatable",
    )
    parser.add_argument("--rows", type=int, help="episodes or contexts of a distance (default: 32; needle 8, babi 16)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds ask the same")
    parser.add_argument("--plot", metavar="PNG", help="draw accuracy by distance")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, or - to print them instead")
    parser.add_argument(
        "--text", default="embedded", help="where sentences are hidden: a file, or a folder's test texts"
    )
    parser.add_argument("--depths", type=int, default=8, help="needles in a context")
    parser.add_argument("--babi", metavar="FOLDER", help="bAbI's tasks, files such as qa1_..._test.txt")
    parser.add_argument("--segment", type=int, default=512, help="tokens read at once by needle and babi")
    add_device(parser)
    return parser


def distances(text: str) -> list[int]:
    """Return the numbers of tokens that ``1k,8k,64k`` names, ascending, each once.

    Raises:
        MemtxError: one that is no number, or below 1.
    """
    found = set()
    for one in text.split(","):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)([kKmM]?)\s*", one)
        value = round(float(parts[1]) * _UNITS[parts[2].lower()]) if parts else 0
        if not 1 <= value <= FARTHEST:
            raise MemtxError(
                f"--distance has '{one.strip()}', expected tokens from 1 to {FARTHEST:,}.", "Such as 1k,8k,64k or 1M."
            )
        found.add(value)
    return sorted(found)


def _sizes(given: list[str]) -> dict[str, str]:
    for one in given:
        if "=" not in one:
            raise MemtxError(f"--size {one} names no number.", "Such as --size pairs=8.")
    return {name.strip(): value.strip() for name, _, value in (one.partition("=") for one in given)}


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    for name, least in (("rows", 1), ("segment", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**63:
            raise MemtxError(f"--{name} is {value}, expected at least {least}.")
    for option in ("plot", "json"):
        target = getattr(arguments, option)
        if target is None or (option == "json" and target == "-"):
            continue
        check_target(option, target)
    if arguments.size and arguments.task in HIDDEN:
        raise MemtxError(f"--size is of drawn tasks, and {arguments.task} is none.", "Leave it out.")
    if arguments.task == "babi" and arguments.babi is None:
        raise MemtxError("--babi is not given, expected the folder of bAbI's tasks.", "Add --babi FOLDER.")


def _open_drawn(arguments: argparse.Namespace) -> tuple[MemoryTransformer, Task]:
    """Return the model and the task it is to be asked."""
    import_modules(arguments.modules)
    device = placed(arguments.device)
    import torch

    from memtx.data.episodes.copying import Copying
    from memtx.data.episodes.overwrite import Overwrite
    from memtx.data.episodes.recall import Recall
    from memtx.data.episodes.tracking import Tracking
    from memtx.evaluation import checkpoint

    kinds: dict[str, type[Task]] = {
        "recall": Recall,
        "capacity": Recall,
        "overwrite": Overwrite,
        "copy": Copying,
        "tracking": Tracking,
    }
    with hinting_import():
        model, trained = checkpoint.load(arguments.checkpoint)
    task = checkpoint.made(kinds[arguments.task], trained, _sizes(arguments.size))
    if task.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"'{arguments.checkpoint}' has a vocabulary of {model.vocab_size}, {arguments.task} of these sizes one of "
            f"{task.vocab_size}.",
            "Give a model trained on it (configs/recall.yaml), or its task's sizes by --size.",
        )
    model.to(device=device, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None)
    return model, task


def _placed_model(model: MemoryTransformer) -> Any:
    """Return the model as a function of tokens from anywhere."""
    device = model.embedding.weight.device
    return lambda tokens, state=None: model(tokens.to(device), state)


def _drawn(arguments: argparse.Namespace, asked: list[int], rows: int) -> list[Measured]:
    from memtx.evaluation.accuracy import accuracy
    from memtx.evaluation.measured import Measured

    model, task = _open_drawn(arguments)
    segments = sorted({max(1, round(distance / task.segment)) for distance in asked})
    results = []
    with progress("evaluating", sum(task.written + one for one in segments)) as watch:
        for one in segments:
            share = accuracy(_placed_model(model), task, one, rows=rows, seed=arguments.seed, watch=watch)
            results.append(Measured(arguments.task, one * task.segment, share, task.chance))
    return results


def _capacities(arguments: argparse.Namespace, rows: int) -> tuple[list[Capacity], Task]:
    from memtx.data.episodes.recall import Recall
    from memtx.evaluation.capacity import capacity

    model, task = _open_drawn(arguments)
    assert isinstance(task, Recall)
    asked = distances(arguments.distance) if arguments.distance is not None else []
    segments = sorted({max(1, round(one / task.segment)) for one in asked}) or list(CAPACITY_SEGMENTS)
    size = model.init_state(1).nbytes
    with progress("evaluating", None) as watch:
        found = [
            capacity(
                _placed_model(model),
                task,
                one,
                state_bytes=size,
                rows=rows,
                seed=arguments.seed,
                watch=lambda _: watch(1),
            )
            for one in segments
        ]
    return found, task


def _hidden(arguments: argparse.Namespace, asked: list[int], rows: int) -> list[Measured]:
    from memtx.data.documents import open_corpus
    from memtx.data.source import SPLITS
    from memtx.evaluation.babi import hidden_stories, open_tasks
    from memtx.evaluation.haystack import Haystack
    from memtx.evaluation.measured import averaged
    from memtx.evaluation.needle import needles

    tasks = open_tasks(arguments.babi) if arguments.task == "babi" else {}
    splits = open_corpus(arguments.text).splits
    if Path(arguments.text).is_file():
        documents = [part for name in SPLITS for part in splits.get(name, ())]
    else:
        # Of texts that the model was not trained on, where they say so.
        documents = next((splits[name] for name in reversed(SPLITS) if splits.get(name)), [])
    model, tokenizer = open_model(arguments)
    haystack: Haystack = Haystack(documents, tokenizer)
    common = {"rows": rows, "seed": arguments.seed, "segment": arguments.segment}
    with progress("evaluating", (sum(asked) + len(asked)) * max(1, len(tasks))) as watch:
        if arguments.task == "babi":
            found = hidden_stories(model, tokenizer, haystack, tasks, asked, watch=watch, **common)
        else:
            found = needles(model, tokenizer, haystack, asked, depths=arguments.depths, watch=watch, **common)
    return [*found, *averaged("all", found)]


def _printed(title: str, columns: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number else "right")
    for line in lines:
        table.add_row(*line)
    # Not as the table's title, which is wrapped to its width.
    sys.stdout.write(f"{title}\n")
    Console().print(table)


def _share(value: float | None) -> str:
    return "too long" if value is None else f"{value:.3f}"


def _table(task: str, results: list[Measured]) -> None:
    """Print a row a distance where there is one condition, else a row a condition and a column a distance."""
    names = list(dict.fromkeys(one.name for one in results))
    if len(names) == 1:
        lines = [[f"{one.distance:,}", _share(one.accuracy), f"{one.chance:.3f}"] for one in results]
        _printed(f"{task}: accuracy by distance", ["tokens", "accuracy", "chance"], lines)
        return
    asked = list(dict.fromkeys(one.distance for one in results))
    lines = []
    for name in names:
        own = [one for one in results if one.name == name]
        lines.append([name, *(_share(one.accuracy) for one in own), f"{own[0].chance:.3f}"])
    _printed(f"{task}: accuracy by tokens of the context", ["", *(f"{one:,}" for one in asked), "chance"], lines)


def _plot(path: str, task: str, results: list[Measured]) -> None:
    from memtx import plots

    curves: dict[str, tuple[list[int], list[float]]] = {}
    for one in results:
        if one.accuracy is not None:
            places, shares = curves.setdefault(one.name, ([], []))
            places.append(one.distance)
            shares.append(one.accuracy)
    chance = sum(one.chance for one in results) / len(results)
    axis = "tokens of the context" if task in HIDDEN else "distance (tokens)"
    plots.accuracy(path, curves, chance=chance, title=task, x=axis)


def _deliver(target: str | None, figures: dict[str, Any]) -> None:
    if target == "-":
        sys.stdout.write(json.dumps(figures) + "\n")
    elif target is not None:
        from memtx import files

        files.write_json(target, figures)


def _evaluate(arguments: argparse.Namespace) -> None:
    _check(arguments)
    asked = distances(arguments.distance if arguments.distance is not None else DISTANCES)
    rows = arguments.rows if arguments.rows is not None else ROWS.get(arguments.task, 32)
    facts = {"task": arguments.task, "checkpoint": arguments.checkpoint, "rows": rows, "seed": arguments.seed}
    if arguments.task == "capacity":
        _evaluate_capacity(arguments, facts)
        return
    results = (_hidden if arguments.task in HIDDEN else _drawn)(arguments, asked, rows)
    if arguments.json != "-":
        _table(arguments.task, results)
    if arguments.plot:
        _plot(arguments.plot, arguments.task, results)
    _deliver(arguments.json, {**facts, "results": [vars(one) for one in results]})


def _evaluate_capacity(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    found, task = _capacities(arguments, facts["rows"])
    if arguments.json != "-":
        lines = [
            [
                f"{one.distance:,}",
                f"{one.distance * task.segment:,}",
                f"{'at least ' * one.limit}{one.pairs}",
                f"{one.state_bytes / 1024:,.1f}",
                f"{one.pairs_per_kib:.3f}",
            ]
            for one in found
        ]
        _printed(
            "capacity: pairs recalled with an accuracy of 0.9",
            ["segments", "tokens", "pairs", "state KiB", "pairs per KiB"],
            lines,
        )
    if arguments.plot:
        from memtx import plots

        curves = {f"{one.distance} segments": (list(one.shares), list(one.shares.values())) for one in found}
        plots.accuracy(arguments.plot, curves, chance=task.chance, title="capacity", x="pairs")
    results = [{**vars(one), "pairs_per_kib": one.pairs_per_kib} for one in found]
    _deliver(arguments.json, {**facts, "chance": task.chance, "results": results})


def main(argv: list[str]) -> int:
    """Run ``memtx evaluate`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _evaluate(arguments), traceback=arguments.traceback)
