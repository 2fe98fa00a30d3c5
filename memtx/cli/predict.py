"""``memtx predict``: labels, tags or answers for raw texts as JSON lines, or surprisal of a run's test texts."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from memtx.cli import options
from memtx.cli.errors import EXIT_USAGE_ERROR, print_error
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.inference.predictor import BasePredictor

RUN_OPTIONS = ("--config", "-c", "--run_dir", "--ckpt_path")
"""Options that name a training run; ``memtx fit``'s parser and data module then read its test split."""

CHUNK_SIZE = 64
"""Inputs per call; their lines are written after it."""

Input = tuple[str, str | dict[str, Any]]
"""The location of an input for messages, and a raw text or the fields of an example."""


def _read_inputs(arguments: argparse.Namespace) -> list[Input]:
    sources = [source for source in (arguments.source, arguments.input, arguments.text) if source is not None]
    if len(sources) != 1:
        raise MemtxError("Expected one source of texts.", "Give --text, --input FILE, or - for standard input.")
    if arguments.text is not None:
        return [("", text) for text in arguments.text]
    path: str = sources[0]
    content, name = options.read_input(path)
    if not path.endswith(".jsonl") and not content.lstrip().startswith(b"{"):
        return [(name, options.decode_utf8(content, name))]
    from memtx.data.tasks.examples import iter_examples

    records = iter_examples(io.BytesIO(content), name if path == "-" else path, lambda record, _: dict(record))
    inputs: list[Input] = [(f"{name}, line {number}", record) for number, record in records]
    if not inputs:
        raise DataError(f"{name} is empty.", "Give one JSON object per line, or a text.")
    return inputs


def _predict(arguments: argparse.Namespace) -> None:
    from memtx.inference.series import is_series_model

    if is_series_model(arguments.checkpoint):
        from memtx.cli.predict_series import predict_series

        predict_series(arguments)
        return
    for name in ("forecast", "plot"):
        if getattr(arguments, name) is not None:
            raise MemtxError(f"--{name} is for models of series.", f"Remove --{name}.")
    inputs = _read_inputs(arguments)
    from memtx import files
    from memtx.inference.predictor import is_task_model
    from memtx.inference.published_tasks import get_published_task

    if get_published_task(arguments.checkpoint) is None and not is_task_model(arguments.checkpoint):
        message = f"'{arguments.checkpoint}' is a language model, not a task model."
        raise MemtxError(message, "Use memtx read to score texts and memtx generate to continue them.")
    predictor = options.load_task_predictor(arguments)
    # All inputs are checked before any output is written.
    for location, content in inputs:
        with options.name_in_errors(location):
            predictor.to_example(content)
    lines: list[str] = []
    for start in range(0, len(inputs), CHUNK_SIZE):
        predictions = _predict_chunk(predictor, inputs[start : start + CHUNK_SIZE])
        lines += [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
        if arguments.output is None:
            sys.stdout.buffer.write("".join(lines).encode("utf-8"))
            sys.stdout.buffer.flush()
            lines.clear()
    if arguments.output is not None:
        files.write_text(arguments.output, "".join(lines))
    options.print_next_command("Serve the model with", "serve", *options.checkpoint_words(arguments), is_data=True)


def _predict_chunk(predictor: BasePredictor, inputs: list[Input]) -> list[dict[str, Any]]:
    try:
        return predictor.predict([content for _, content in inputs])
    except DataError:
        # Repeated one by one, to name the location of the invalid input.
        for location, content in inputs:
            with options.name_in_errors(location):
                predictor.predict([content])
        raise


def main(argv: list[str]) -> int:
    """Run ``memtx predict``."""
    names = [argument.partition("=")[0] for argument in argv]
    run_option = next((name for name in names if name in RUN_OPTIONS), None)
    if run_option is not None and "--checkpoint" in names:
        print_error(f"--checkpoint is for raw texts, {run_option} for the test texts of a run. Give one of them.")
        return EXIT_USAGE_ERROR
    if run_option is not None:
        from memtx.cli.fit import main as fit

        return fit(["predict", *argv])
    parser = options.Parser(
        "memtx predict",
        "Print the predictions of a task model as JSON lines with label, tags and spans, or answer. With --run_dir or "
        "--ckpt_path of a language model, read the test texts of that run and write the surprisal of every token to "
        "the run folder. With a model of series, FILE is a CSV file or a NumPy array; - reads CSV lines as they come.",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="FILE", help="same as --input; - reads standard input")
    parser.add_model_options(segment_length=None)
    add("--text", action="append", metavar="TEXT", help="raw text; repeatable")
    add("--input", metavar="FILE", help="examples as JSON lines; any other file is one raw text")
    add("--output", metavar="FILE", help="file to write all lines to at the end, instead of stdout")
    add("--forecast", type=options.positive_int, metavar="N", help="of a series: steps to continue it after its end")
    add("--plot", type=options.output_path, metavar="PNG", help="of a series: plot it with its predictions")
    return parser.run(argv, _predict)
