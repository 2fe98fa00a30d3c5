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

from memtx.cli.options import Parser, check_output_path, progress_bar, run
from memtx.cli.read import add_device_options, import_modules, resolve_device
from memtx.data.sources.base import SPLITS
from memtx.errors import MemtxError

if TYPE_CHECKING:
    from torch import nn

    from memtx.evaluation.compare import ModelComparison

M = TypeVar("M", bound="nn.Module")

ACTIONS = ("report",)


def _build_parser() -> Parser:
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
    parser.add_argument("--max-length", type=int, default=16384, help="of each text, for language models")
    parser.add_argument("--segment-length", type=int, default=256, help="tokens a call, for language models")
    parser.add_argument(
        "--min-position",
        type=int,
        default=0,
        help="first position in a text that counts for the score of language models",
    )
    parser.add_argument("--num-timed", type=int, default=20, help="inputs on which each is timed, several times")
    parser.add_argument("--plot", metavar="PNG", help="draw them")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, or - to print them instead")
    add_device_options(parser)
    return parser


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("max_length", 2), ("segment_length", 1), ("min_position", 0), ("num_timed", 1)):
        value = getattr(arguments, name)
        if value < least:
            raise MemtxError(f"--{name.replace('_', '-')} is {value}.", f"Give at least {least}.")
    if arguments.min_position >= arguments.max_length:
        raise MemtxError(
            f"--min-position is {arguments.min_position}, and {arguments.max_length} tokens of each text are read.",
            "Give fewer, or more --max-length.",
        )
    for option in ("plot", "json"):
        target = getattr(arguments, option)
        if target not in (None, "-"):
            check_output_path(option, target)


def _get_display_names(paths: list[str]) -> list[str]:
    """Return the last part of each path, or the whole where two would be called alike."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _move_to_device(model: M, arguments: argparse.Namespace) -> M:
    import torch

    return model.to(resolve_device(arguments.device), getattr(torch, arguments.dtype) if arguments.dtype else None)


def _compare_task_models(arguments: argparse.Namespace, paths: list[str]) -> list[ModelComparison]:
    from memtx.data.tasks.examples import read_examples, split_path
    from memtx.evaluation.compare import REPEATS, ParsedRecord, compare_task_models
    from memtx.inference.predictor import Predictor

    named = [(name, Predictor.load(path)) for name, path in zip(_get_display_names(paths), paths, strict=True)]
    first = named[0][1].task
    for name, predictor in named[1:]:
        if (predictor.task.kind, predictor.task.labels) != (first.kind, first.labels):
            raise MemtxError(
                f"'{name}' is of another task, or of other labels, than its teacher.", "Give runs on the same examples."
            )

    def parse_example(record: Any, labelled: bool) -> ParsedRecord:
        return ParsedRecord(dict(record), first.parse(record, labelled))

    found = read_examples(split_path(arguments.data, arguments.split), parse_example)[: arguments.limit]
    examples = [asked for _, asked in found]
    for _, predictor in named:
        _move_to_device(predictor.model, arguments)
    total = len(named) * (len(examples) + REPEATS * min(arguments.num_timed, len(examples)))
    with progress_bar("measuring", total) as advance:
        return compare_task_models(named, examples, num_timed=arguments.num_timed, on_progress=partial(advance, 1))


def _compare_language_models(arguments: argparse.Namespace, paths: list[str]) -> list[ModelComparison]:
    from memtx.checkpoint.load import load_model_and_tokenizer
    from memtx.data.sources.corpus import open_corpus
    from memtx.evaluation.compare import REPEATS, TextBatch, compare_language_models

    loaded = [load_model_and_tokenizer(path) for path in paths]
    names, tokenizer = _get_display_names(paths), loaded[0][1]
    for name, (_, own) in zip(names, loaded, strict=True):
        if own.to_json() != tokenizer.to_json():
            raise MemtxError(
                f"'{name}' has another tokenizer than its teacher.", "Give runs on the same texts and tokenizer."
            )
    documents = open_corpus(arguments.data).get_split(arguments.split)[: arguments.limit]
    texts = TextBatch.from_documents(documents, tokenizer, arguments.max_length)
    named = [(name, _move_to_device(model, arguments)) for name, (model, _) in zip(names, loaded, strict=True)]
    total = len(named) * (-(-texts.tokens.shape[1] // arguments.segment_length) + REPEATS * arguments.num_timed)
    with progress_bar("measuring", total) as advance:
        return compare_language_models(
            named,
            texts,
            segment_length=arguments.segment_length,
            min_position=arguments.min_position,
            num_timed=arguments.num_timed,
            on_progress=partial(advance, 1),
        )


def _print_table(comparisons: list[ModelComparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    teacher, table = comparisons[0], Table()
    measure = teacher.metric.replace("_", " ")
    for number, column in enumerate(("", "parameters", "smaller", "ms a call", "faster", measure, "kept")):
        table.add_column(column, justify="left" if not number else "right")
    for one in comparisons:
        shares = (one.size_reduction(teacher), one.speed_gain(teacher), one.score_retention(teacher))
        smaller, faster, kept = ("" if one is teacher else f"{share:.1%}" for share in shares)
        table.add_row(
            one.name, f"{one.num_parameters:,}", smaller, f"{one.latency_ms:.2f}", faster, f"{one.score:.4f}", kept
        )
    Console().print(table)


def _plot(path: str, comparisons: list[ModelComparison]) -> None:
    from memtx import plots

    panels = {
        "parameters": [float(one.num_parameters) for one in comparisons],
        "ms a call": [one.latency_ms for one in comparisons],
        comparisons[0].metric.replace("_", " "): [one.score for one in comparisons],
    }
    plots.plot_model_comparison(path, panels, [one.name for one in comparisons])


def _report(arguments: argparse.Namespace) -> None:
    _check_arguments(arguments)
    import_modules(arguments.modules)
    from memtx import files
    from memtx.inference.predictor import is_task_model

    paths = [arguments.teacher, *arguments.student]
    kinds = [is_task_model(path) for path in paths]
    if any(kinds) != all(kinds):
        raise MemtxError("Some are a task's models and some are language models.", "Give runs of one kind.")
    found = (_compare_task_models if all(kinds) else _compare_language_models)(arguments, paths)
    if arguments.json != "-":
        _print_table(found)
    if arguments.plot:
        _plot(arguments.plot, found)
    teacher = found[0]
    figures: dict[str, Any] = {"teacher": vars(teacher), "students": []}
    for one in found[1:]:
        shares = {
            "size_reduction": one.size_reduction(teacher),
            "speed_gain": one.speed_gain(teacher),
            "score_retention": one.score_retention(teacher),
        }
        figures["students"].append({**vars(one), **shares})
    if arguments.json == "-":
        sys.stdout.write(json.dumps(figures) + "\n")
    elif arguments.json is not None:
        files.write_json(arguments.json, figures)


def main(argv: list[str]) -> int:
    """Run ``memtx distil`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _report(arguments), traceback=arguments.traceback)
