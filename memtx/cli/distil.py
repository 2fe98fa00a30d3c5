"""``memtx distil report``: students beside their teacher in size, speed and quality, as a table and a picture.

Distilling itself is training: ``memtx fit`` with a module whose ``distillation`` names the teacher.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from memtx.cli.common import Parser, check_target, progress, run
from memtx.cli.read import add_device, import_modules, placed
from memtx.data.source import SPLITS
from memtx.errors import MemtxError

if TYPE_CHECKING:
    from torch import nn

    from memtx.evaluation.beside import Beside

M = TypeVar("M", bound="nn.Module")

ACTIONS = ("report",)


def _parser() -> Parser:
    parser = Parser(
        "memtx distil",
        "Put students beside their teacher: parameters, milliseconds a call, and the score of a task or the bits per "
        "byte of texts. To distil, train with a teacher: memtx fit --config configs/distilbert.yaml, "
        "tinybert-general, tinybert-task or long-to-memory.",
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("--teacher", required=True, metavar="RUN", help="a run's folder, a checkpoint or a folder")
    parser.add_argument(
        "--student", required=True, action="append", metavar="RUN", help="likewise; repeatable, the first of its name"
    )
    parser.add_argument(
        "--data", required=True, metavar="FOLDER", help="the task's examples, or texts in train/, validation/, test/"
    )
    parser.add_argument("--split", default="test", choices=SPLITS, help="which of them are read")
    parser.add_argument("--limit", type=int, default=1000, help="examples of the split that are read at most")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text, for language models")
    parser.add_argument("--segment", type=int, default=256, help="tokens a call, for language models")
    parser.add_argument(
        "--beyond", type=int, default=0, help="first position in a text that counts for the score of language models"
    )
    parser.add_argument("--calls", type=int, default=20, help="inputs on which each is timed, several times")
    parser.add_argument("--plot", metavar="PNG", help="draw them")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, or - to print them instead")
    add_device(parser)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("tokens", 2), ("segment", 1), ("beyond", 0), ("calls", 1)):
        value = getattr(arguments, name)
        if value < least:
            raise MemtxError(f"--{name} is {value}.", f"Give at least {least}.")
    if arguments.beyond >= arguments.tokens:
        raise MemtxError(
            f"--beyond is {arguments.beyond}, and {arguments.tokens} tokens of each text are read.",
            "Give fewer, or more --tokens.",
        )
    for option in ("plot", "json"):
        target = getattr(arguments, option)
        if target not in (None, "-"):
            check_target(option, target)


def _names(paths: list[str]) -> list[str]:
    """Return the last part of each path, or the whole where two would be called alike."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _place(model: M, arguments: argparse.Namespace) -> M:
    import torch

    return model.to(placed(arguments.device), getattr(torch, arguments.dtype) if arguments.dtype else None)


def _tasks(arguments: argparse.Namespace, paths: list[str]) -> list[Beside]:
    from memtx.data.examples import read_examples, split_file
    from memtx.evaluation.beside import REPEATS, Asked, tasks_beside
    from memtx.inference.predictor import Predictor

    named = [(name, Predictor.load(path)) for name, path in zip(_names(paths), paths, strict=True)]
    first = named[0][1].task
    for name, predictor in named[1:]:
        if (predictor.task.kind, predictor.task.labels) != (first.kind, first.labels):
            raise MemtxError(
                f"'{name}' is of another task, or of other labels, than its teacher.", "Give runs on the same examples."
            )

    def parsed(record: Any, labelled: bool) -> Asked:
        return Asked(dict(record), first.parse(record, labelled))

    found = read_examples(split_file(arguments.data, arguments.split), parsed)[: arguments.limit]
    examples = [asked for _, asked in found]
    for _, predictor in named:
        _place(predictor.model, arguments)
    total = len(named) * (len(examples) + REPEATS * min(arguments.calls, len(examples)))
    with progress("measuring", total) as advance:
        return tasks_beside(named, examples, calls=arguments.calls, watch=partial(advance, 1))


def _texts(arguments: argparse.Namespace, paths: list[str]) -> list[Beside]:
    from memtx.data.documents import open_corpus
    from memtx.evaluation.beside import REPEATS, Texts, texts_beside
    from memtx.inference.loading import load

    loaded = [load(path) for path in paths]
    names, tokenizer = _names(paths), loaded[0][1]
    for name, (_, own) in zip(names, loaded, strict=True):
        if own.to_json() != tokenizer.to_json():
            raise MemtxError(
                f"'{name}' has another tokenizer than its teacher.", "Give runs on the same texts and tokenizer."
            )
    documents = open_corpus(arguments.data).split(arguments.split)[: arguments.limit]
    texts = Texts.of(documents, tokenizer, arguments.tokens)
    named = [(name, _place(model, arguments)) for name, (model, _) in zip(names, loaded, strict=True)]
    total = len(named) * (-(-texts.tokens.shape[1] // arguments.segment) + REPEATS * arguments.calls)
    with progress("measuring", total) as advance:
        return texts_beside(
            named,
            texts,
            segment=arguments.segment,
            beyond=arguments.beyond,
            calls=arguments.calls,
            watch=partial(advance, 1),
        )


def _table(found: list[Beside]) -> None:
    from rich.console import Console
    from rich.table import Table

    teacher, table = found[0], Table()
    measure = teacher.measure.replace("_", " ")
    for number, column in enumerate(("", "parameters", "smaller", "ms a call", "faster", measure, "kept")):
        table.add_column(column, justify="left" if not number else "right")
    for one in found:
        shares = (one.smaller(teacher), one.faster(teacher), one.kept(teacher))
        smaller, faster, kept = ("" if one is teacher else f"{share:.1%}" for share in shares)
        table.add_row(
            one.name, f"{one.parameters:,}", smaller, f"{one.milliseconds:.2f}", faster, f"{one.score:.4f}", kept
        )
    Console().print(table)


def _plot(path: str, found: list[Beside]) -> None:
    from memtx import plots

    panels = {
        "parameters": [float(one.parameters) for one in found],
        "ms a call": [one.milliseconds for one in found],
        found[0].measure.replace("_", " "): [one.score for one in found],
    }
    plots.beside(path, panels, [one.name for one in found])


def _report(arguments: argparse.Namespace) -> None:
    _check(arguments)
    import_modules(arguments.modules)
    from memtx import files
    from memtx.inference.predictor import serves_a_task

    paths = [arguments.teacher, *arguments.student]
    kinds = [serves_a_task(path) for path in paths]
    if any(kinds) != all(kinds):
        raise MemtxError("Some are a task's models and some are language models.", "Give runs of one kind.")
    found = (_tasks if all(kinds) else _texts)(arguments, paths)
    if arguments.json != "-":
        _table(found)
    if arguments.plot:
        _plot(arguments.plot, found)
    teacher = found[0]
    figures: dict[str, Any] = {"teacher": vars(teacher), "students": []}
    for one in found[1:]:
        shares = {"smaller": one.smaller(teacher), "faster": one.faster(teacher), "kept": one.kept(teacher)}
        figures["students"].append({**vars(one), **shares})
    if arguments.json == "-":
        sys.stdout.write(json.dumps(figures) + "\n")
    elif arguments.json is not None:
        files.write_json(arguments.json, figures)


def main(argv: list[str]) -> int:
    """Run ``memtx distil`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _report(arguments), traceback=arguments.traceback)
