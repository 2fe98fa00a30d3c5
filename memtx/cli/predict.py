"""``memtx predict``: labels, tags or answers of raw texts, as lines of JSON; a run's own figures where one is named."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memtx.cli.options import EXIT_USAGE_ERROR, Parser, print_error, run
from memtx.cli.read import add_checkpoint_option, add_device_options, import_modules, resolve_device
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.inference.predictor import BasePredictor

RUN_OPTIONS = ("--config", "-c", "--run_dir", "--ckpt_path")
"""Options that name a run and its data: the documents of its test split are read, as training would read them."""

CHUNK_SIZE = 64
"""Inputs between two writes."""


def _build_parser() -> Parser:
    parser = Parser(
        "memtx predict",
        "Print what a task's model says of texts: a line of JSON each, with label, tags and spans, or answer. "
        "With --run_dir or --ckpt_path of a language model it reads that run's test texts instead and writes every "
        "token's surprisal into the run's folder.",
    )
    parser.add_argument(
        "source", nargs="?", metavar="FILE", help="as --input, or - for standard input: lines of JSON, or one raw text"
    )
    add_checkpoint_option(parser)
    parser.add_argument("--text", action="append", metavar="TEXT", help="a raw text; repeatable")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="examples, one JSON object a line; any other text file is one text",
    )
    parser.add_argument("--output", metavar="FILE", help="write the lines there, all or none, instead of printing them")
    add_device_options(parser)
    return parser


def load_task_predictor(arguments: argparse.Namespace) -> BasePredictor:
    """Load the task's model that the arguments name, onto their device and in their precision.

    Raises:
        MemtxError: the checkpoint cannot be used, or there is no such device.
    """
    import_modules(arguments.modules)
    device = resolve_device(arguments.device)
    import torch

    from memtx.inference.predictor import load_predictor

    predictor = load_predictor(arguments.checkpoint)
    predictor.model.to(device=device, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None)
    return predictor


def _read_inputs(arguments: argparse.Namespace) -> list[tuple[str, str | dict[str, Any]]]:
    """Return where each input stands, for messages, and what it is."""
    source = arguments.source if arguments.source is not None else arguments.input
    if (source is None) == (arguments.text is None) or (arguments.source is not None and arguments.input is not None):
        raise MemtxError("There must be one source of texts.", "Give --text, --input FILE, or - for standard input.")
    if arguments.text is not None:
        return [("", text) for text in arguments.text]
    content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    name = "standard input" if source == "-" else f"'{source}'"
    if not source.endswith(".jsonl") and not content.lstrip().startswith(b"{"):
        try:
            return [(name, content.decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8: {error.reason} at byte {error.start}.", "Convert it.") from error
    from memtx.data.tasks.examples import iter_examples

    lines: IO[bytes] = io.BytesIO(content)
    found = iter_examples(lines, source if source != "-" else "standard input", lambda record, _: dict(record))
    inputs: list[tuple[str, str | dict[str, Any]]] = [(f"{name}, line {number}", one) for number, one in found]
    if not inputs:
        raise DataError(f"{name} holds nothing.", "Give one JSON object a line, or a text.")
    return inputs


def _predict(arguments: argparse.Namespace) -> None:
    inputs = _read_inputs(arguments)
    from memtx.inference.predictor import is_task_model

    if not is_task_model(arguments.checkpoint):
        raise MemtxError(
            f"'{arguments.checkpoint}' is a language model, which labels nothing.",
            "memtx read measures texts with it, memtx generate writes on.",
        )
    predictor = load_task_predictor(arguments)
    # All are looked at before anything is said of the first.
    for where, given in inputs:
        try:
            predictor.to_example(given)
        except DataError as error:
            raise DataError(f"{where}: {error.message}" if where else error.message, error.hint) from error
    lines = []
    for at in range(0, len(inputs), CHUNK_SIZE):
        part = inputs[at : at + CHUNK_SIZE]
        for said in _predict_chunk(predictor, part):
            line = json.dumps(said, ensure_ascii=False) + "\n"
            if arguments.output is None:
                sys.stdout.buffer.write(line.encode("utf-8"))
            else:
                lines.append(line)
        sys.stdout.buffer.flush()
    if arguments.output is not None:
        from memtx import files

        files.write_text(arguments.output, "".join(lines))


def _predict_chunk(predictor: BasePredictor, inputs: list[tuple[str, str | dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        return predictor.predict([given for _, given in inputs])
    except DataError:
        # One by one, to name the one that is wrong by its line.
        for where, given in inputs:
            try:
                predictor.predict([given])
            except DataError as error:
                raise DataError(f"{where}: {error.message}" if where else error.message, error.hint) from error
        raise


def main(argv: list[str]) -> int:
    """Run ``memtx predict`` with its arguments and return the exit code."""
    given = [one.partition("=")[0] for one in argv]
    named = next((one for one in given if one in RUN_OPTIONS), None)
    if named is not None and "--checkpoint" in given:
        print_error(f"--checkpoint answers raw texts, {named} reads a run's own test texts. Give one of them.")
        return EXIT_USAGE_ERROR
    if named is not None:
        from memtx.cli.fit import main as measured

        return measured(["predict", *argv])
    arguments = _build_parser().parse(argv)
    return run(lambda: _predict(arguments), traceback=arguments.traceback)
