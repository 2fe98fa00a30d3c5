"""``memtx predict``: labels, tags or answers for raw texts as JSON lines, or surprisal of a run's test texts."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memtx.cli import options
from memtx.cli.errors import EXIT_USAGE_ERROR, print_error
from memtx.cli.prediction_output import PredictionOutput
from memtx.errors import DataError, MemtxError

if TYPE_CHECKING:
    from memtx.inference.predictor import BasePredictor

RUN_OPTIONS = ("--config", "-c", "--run_dir", "--ckpt_path")
"""Options that name a training run; ``memtx fit``'s parser and data module then read its test split."""

LINE_SUFFIXES = (".jsonl", ".ndjson")

GENERATION_OPTIONS = (
    *("num_beams", "max_length", "length_penalty", "no_repeat_ngram_size"),
    *("temperature", "top_k", "top_p", "repetition_penalty", "seed"),
)
"""Options of models that make texts."""

Input = tuple[str, str | dict[str, Any]]
"""The location of an input for messages, and a raw text or the fields of an example."""


class _Lines:
    """The lines of a file as they are read, with the number of bytes so far.

    Blank lines at the beginning are looked at to tell JSON lines from a raw text.
    """

    def __init__(self, file: IO[bytes], path: str) -> None:
        self.num_bytes = 0
        first_lines: list[bytes] = []
        lines = iter(file)
        for line in lines:
            first_lines.append(line)
            if line.strip():
                break
        start = b"".join(first_lines).removeprefix(codecs.BOM_UTF8).lstrip()
        if path.endswith(".json") and start.startswith(b"["):
            raise DataError(f"'{path}' is a JSON array.", "Give one JSON object a line.")
        self.are_records = path.endswith(LINE_SUFFIXES) or start.startswith(b"{")
        self._lines = chain(first_lines, lines)

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.num_bytes += len(line)
            yield line


def _iter_inputs(lines: _Lines, path: str) -> Iterator[Input]:
    """Yield the records of JSON lines, or one raw text; raises DataError if there is nothing."""
    name = options.input_name(path)
    if not lines.are_records:
        yield name, options.decode_utf8(b"".join(lines), name)
        return
    from memtx.data.tasks.examples import iter_examples

    number = None
    for number, record in iter_examples(lines, name if path == "-" else path, lambda record, _: dict(record)):
        yield f"{name}, line {number}", record
    if number is None:
        raise DataError(f"{name} is empty.", "Give one JSON object per line, or a text.")


def _check_inputs(predictor: BasePredictor, inputs: Iterable[Input]) -> None:
    """Raise DataError for the first input that does not fit the task."""
    for location, content in inputs:
        with options.name_in_errors(location):
            predictor.to_example(content)


def _predict(arguments: argparse.Namespace) -> None:
    from memtx.inference.series import is_series_model

    if is_series_model(arguments.checkpoint):
        from memtx.cli.predict_series import predict_series

        if arguments.resume:
            raise MemtxError("--resume does not apply to a series.", "Remove --resume.")
        for name in GENERATION_OPTIONS:
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise MemtxError(f"{option} is for models that make texts.", f"Remove {option}.")
        predict_series(arguments)
        return
    for name in ("forecast", "plot"):
        if getattr(arguments, name) is not None:
            raise MemtxError(f"--{name} is for models of series.", f"Remove --{name}.")
    sources = [source for source in (arguments.source, arguments.input, arguments.text) if source is not None]
    if len(sources) != 1:
        raise MemtxError("Expected one source of texts.", "Give --text, --input FILE, or - for standard input.")
    with contextlib.ExitStack() as stack:
        path: str = "-" if arguments.text is not None else sources[0]
        # A wrong path fails before the model is loaded.
        file = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        from memtx.inference.predictor import is_task_model
        from memtx.inference.published_tasks import get_published_task

        if get_published_task(arguments.checkpoint) is None and not is_task_model(arguments.checkpoint):
            message = f"'{arguments.checkpoint}' is a language model, not a task model."
            raise MemtxError(message, "Use memtx read to score texts and memtx generate to continue them.")
        output = PredictionOutput(arguments.output, arguments.resume)
        predictor = options.load_task_predictor(arguments)
        _set_generation(predictor, arguments)
        lines: _Lines | None = None
        total: int | None = None
        if arguments.text is not None:
            inputs: Iterator[Input] = iter([("", text) for text in arguments.text])
            _check_inputs(predictor, [("", text) for text in arguments.text])
        else:
            if path != "-" and Path(path).is_file():
                # All inputs of a file are checked before any output is written.
                _check_inputs(predictor, _iter_inputs(_Lines(file, path), path))
                total = file.seek(0, os.SEEK_END)
                file.seek(0)
            lines = _Lines(file, path)
            inputs = _iter_inputs(lines, path)
        with output, options.progress_bar("predicting", total, in_bytes=True) as advance:
            _predict_all(predictor, inputs, output, lines, advance)
    options.print_next_command("Serve the model with", "serve", *options.checkpoint_words(arguments), is_data=True)


def _predict_all(
    predictor: BasePredictor,
    inputs: Iterator[Input],
    output: PredictionOutput,
    lines: _Lines | None,
    advance: options.ProgressUpdate,
) -> None:
    """Predict all inputs but those of a resumed output, some at a time."""
    num_skipped = sum(1 for _ in islice(inputs, output.num_lines))
    if num_skipped < output.num_lines:
        message = f"The output has {output.num_lines:,} lines, the input {num_skipped:,}."
        raise MemtxError(message, "Resume with the same input.")
    num_bytes, start = 0, time.monotonic()
    while True:
        chunk: list[Input] = []
        error = None
        try:
            for entry in islice(inputs, predictor.chunk_size):
                chunk.append(entry)
        except DataError as read_error:  # What comes before a bad line of a stream is predicted.
            error = read_error
        if chunk:
            output.write(_predict_chunk(predictor, chunk))
        if error is not None:
            raise error
        if not chunk:
            return
        rate = (output.num_lines - num_skipped) / max(time.monotonic() - start, 1e-9)
        read_bytes = 0 if lines is None else lines.num_bytes
        advance(read_bytes - num_bytes, f"{output.num_lines:,} lines, {rate:,.1f} lines/s")
        num_bytes = read_bytes


def _set_generation(predictor: BasePredictor, arguments: argparse.Namespace) -> None:
    """Change how a model makes texts; raise MemtxError for one that makes none."""
    changes = {name: value for name in GENERATION_OPTIONS if (value := getattr(arguments, name)) is not None}
    if not changes:
        return
    from memtx.inference.text_to_text import TextToText

    if not isinstance(predictor, TextToText):
        option = f"--{next(iter(changes)).replace('_', '-')}"
        message = (
            f"{option} is for encoder-decoders, '{arguments.checkpoint}' predicts {predictor.task_name} without it."
        )
        raise MemtxError(message, f"Remove {option}.")
    predictor.generation = predictor.generation.changed(**changes)


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
        "Print the predictions of a task model as JSON lines with labels, tags and spans, answers, choices, vectors or "
        "texts, and their probabilities. Input of any size is read line by line. With --run_dir or --ckpt_path of a "
        "language model, read the test texts of that run and write the surprisal of every token to the run folder. "
        "With a model of series, FILE is a CSV file or a NumPy array; - reads CSV lines as they come.",
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="FILE", help="same as --input; - reads standard input")
    parser.add_model_options(segment_length=None)
    add("--text", action="append", metavar="TEXT", help="raw text; repeatable")
    add("--input", metavar="FILE", help="examples as JSON lines; any other file is one raw text")
    text = "file to write the lines to instead of stdout; FILE.partial until all are written"
    add("--output", type=options.output_path, metavar="FILE", help=text)
    add("--resume", action="store_true", help="continue FILE.partial of an interrupted run with the same input")
    add("--forecast", type=options.positive_int, metavar="N", help="of a series: steps to continue it after its end")
    add("--plot", type=options.output_path, metavar="PNG", help="of a series: plot it with its predictions")
    add("--num-beams", type=int, help="texts made from texts: hypotheses of the beam search; 1 is greedy")
    add("--max-length", type=int, help="texts made from texts: tokens of a new text at most")
    add("--length-penalty", type=float, help="beam search: exponent of the length; above 0, longer texts gain")
    add("--no-repeat-ngram-size", type=int, help="length of the n-grams that no new text has twice; 0 allows all")
    add("--temperature", type=float, help="texts made from texts: sample them with this temperature; 0 is greedy")
    add("--top-k", type=int, help="sample from the k most likely tokens; 0 keeps all")
    add("--top-p", type=float, help="sample from the most likely tokens with a total probability of p")
    add("--repetition-penalty", type=float, help="values above 1 make tokens of the new text less likely")
    add("--seed", type=int, help="seed of samples")
    return parser.run(argv, _predict)
