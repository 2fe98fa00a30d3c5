"""Shared parts of the commands: option parsing, checkpoint loading, progress and output."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from memtx import files
from memtx.cli.errors import EXIT_USAGE_ERROR, print_error, run, shorten_message
from memtx.errors import CheckpointError, DataError, MemtxError

if TYPE_CHECKING:
    from memtx.data.sources.base import Corpus
    from memtx.data.tokenizers import Tokenizer
    from memtx.inference.predictor import BasePredictor
    from memtx.inference.reader import StreamReader
    from memtx.layers.block import Block
    from memtx.models.memory_transformer import MemoryTransformer
    from memtx.models.recurrent_reformer import RecurrentReformer as PretrainedReformer

    PretrainedLM = MemoryTransformer | PretrainedReformer

N = TypeVar("N", int, float)
ProgressUpdate = Callable[..., None]
"""``advance(amount, note="")`` of :func:`progress_bar`."""

MAX_INT = 2**63 - 1
DTYPES = ("float32", "bfloat16", "float64")


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error as one line and suggests the closest option for a typo."""

    def __init__(self, prog: str, description: str) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        # No abbreviations: a unique one would become ambiguous when an option is added.
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=formatter)
        self._argv: Sequence[str] = ()
        self.add_argument("--traceback", action="store_true", help="also print the traceback of an error")

    def format_help(self) -> str:
        """Format the help without the defaults None, False and []."""
        return re.sub(r"\s+\(default:\s+(None|False|\[\])\)", "", super().format_help())

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse the arguments, or exit with code 2 after one line on stderr."""
        self._argv = argv
        return self.parse_args(argv)

    def run(self, argv: list[str], body: Callable[[argparse.Namespace], int | None]) -> int:
        """Parse the arguments, call ``body`` with them and return the exit code of :func:`run`."""
        arguments = self.parse(argv)
        arguments.argv = argv
        return run(lambda: body(_with_local_checkpoint(arguments)), traceback=arguments.traceback)

    def error(self, message: str) -> NoReturn:
        """Write one line on stderr and exit with code 2."""
        options = [option for action in self._actions for option in action.option_strings]
        # argparse reports a missing required option before the typo that explains it.
        names = [argument.partition("=")[0] for argument in self._argv]
        unknown = [name for name in names if name.startswith("--") and name != "--" and name not in options]
        if unknown and "are required" in message:
            message = f"unrecognized arguments: {unknown[0]}"
        print_error(shorten_message(message, options))
        raise SystemExit(EXIT_USAGE_ERROR)

    def add_model_options(
        self, *, checkpoint: bool = True, segment_length: int | None = 512, window: bool = False
    ) -> None:
        """Add ``--checkpoint``, ``--segment-length`` with its default, ``--device``, ``--dtype`` and ``--import``.

        If ``window`` is True, add ``--window`` too.
        """
        if checkpoint:
            text = (
                "a .ckpt file, a run folder (its best checkpoint), a model folder, or user/name[@revision] of the hub"
            )
            self.add_argument("--checkpoint", required=True, help=text)
        if segment_length is not None:
            self.add_argument("--segment-length", type=positive_int, default=segment_length, help="tokens per call")
        if window:
            text = "tokens that a Hugging Face decoder sees exactly; defaults to as many as it was trained on"
            self.add_argument("--window", type=positive_int, metavar="N", help=text)
        text = "device to compute on, such as cpu, cuda or cuda:1; auto takes an accelerator if there is one"
        self.add_argument("--device", default="auto", help=text)
        self.add_argument("--dtype", choices=DTYPES, help="dtype of weights and state; defaults to the checkpoint's")
        self.add_import_option()

    def add_parse_special_option(self) -> None:
        """Add ``--parse-special``."""
        text = "read text that spells a special token, such as <|im_end|>, as that token"
        self.add_argument("--parse-special", action="store_true", help=text)

    def add_import_option(self) -> None:
        """Add ``--import``."""
        text = "module of your own classes that the checkpoint uses, in this folder or PYTHONPATH; repeatable"
        self.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=text)

    def add_output_options(self, plot: str) -> None:
        """Add ``--plot``, described by ``plot``, and ``--json``."""
        self.add_argument("--plot", type=output_path, metavar="PNG", help=f"plot {plot}")
        self.add_argument("--json", type=output_path, metavar="FILE", help="write JSON to a file; - prints only JSON")


def number_range(kind: type[N], minimum: float | None = None, maximum: float = MAX_INT) -> Callable[[str], N]:
    """Return an argparse type for numbers from ``minimum`` to ``maximum``; without ``minimum``, above 0."""

    def parse(text: str) -> N:
        value = kind(text)
        if minimum is None and not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


positive_int, non_negative_int, positive_float = number_range(int, 1), number_range(int, 0), number_range(float)


def byte_size(text: str) -> int:
    """Argparse type for a number of bytes such as ``2GiB``, ``500MB`` or ``0``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 2GiB, got {text}")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return min(int(float(match[1]) * (1024 if match[3] else 1000) ** power), MAX_INT)


def output_path(text: str) -> str:
    """Argparse type that accepts ``-`` or a file in an existing folder, so that a typo fails before any work."""
    if text != "-":
        if not (folder := Path(text).absolute().parent).is_dir():
            raise argparse.ArgumentTypeError(f"the folder '{folder}' does not exist")
        if Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"'{text}' is a folder, expected a file")
    return text


def input_name(path: str) -> str:
    """Return the name of an input file for messages."""
    return "standard input" if path == "-" else f"'{path}'"


def read_input(path: str) -> tuple[bytes, str]:
    """Return the content of a file, or of standard input for ``-``, and its name for messages."""
    return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes(), input_name(path)


def decode_utf8(content: bytes, name: str) -> str:
    """Decode a text without its byte order mark, or raise DataError if it is not UTF-8."""
    from memtx.data.encodings import Utf8Decoder

    return Utf8Decoder(name).decode(content, final=True)


def open_corpus(root: str) -> Corpus:
    """Open a corpus and write what is left out, and how texts are assigned to splits, on stderr."""
    from memtx.data.sources.corpus import open_corpus

    corpus = open_corpus(root)
    sys.stderr.writelines(f"memtx: {note}\n" for note in corpus.notes)
    return corpus


@contextlib.contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """Put the name of an input before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error.message}" if name else error.message, error.hint) from error


def get_placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return device and dtype as keywords of ``nn.Module.to``; raises MemtxError if the device cannot be used."""
    import torch

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    best, reason = torch.accelerator.current_accelerator(check_available=True), ""
    available = "cpu" if best is None else f"{best.type}, cpu"
    for name in available.split(", ") if arguments.device == "auto" else [arguments.device]:
        if reason:
            sys.stderr.write(f"memtx: {available.partition(',')[0]} cannot be used ({reason}); using the CPU.\n")
        try:
            device = torch.device(name)
            torch.ones(1, device=device, dtype=dtype).item()  # MPS has no float64, meta no values
            return {"device": device, "dtype": dtype}
        except (RuntimeError, AssertionError, TypeError) as error:
            lines = str(error).partition("one of cpu, ")[0].splitlines()
            reason = "there is no such device" if not lines or lines[0].endswith("Expected ") else lines[0].rstrip(".")
    raise MemtxError(f"--device {arguments.device} cannot be used: {reason}.", f"Use auto, or one of: {available}.")


@contextlib.contextmanager
def user_modules(names: Sequence[str]) -> Iterator[None]:
    """Import the modules of ``--import``, or raise MemtxError; if the block lacks a class, its error names the option.

    A checkpoint never causes an import by itself.
    """
    if names and (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that it hides no other module
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise MemtxError(f"--import {name} failed: {error}.", "Check that its folder is in PYTHONPATH.") from error
    try:
        yield
    except CheckpointError as error:
        if "was not imported" not in error.message:
            raise
        raise CheckpointError(error.message, "If you trust it, add --import and the module's name.") from error


def load_model(arguments: argparse.Namespace) -> tuple[PretrainedLM, Tokenizer]:
    """Load model and tokenizer from ``--checkpoint`` on the device of the arguments; raises MemtxError.

    For a Hugging Face decoder, a line on stderr says what it sees.
    """
    placement = get_placement(arguments)
    from memtx.checkpoint.load import load_language_model
    from memtx.models.recurrent_reformer import RecurrentReformer

    with user_modules(arguments.modules):
        model, tokenizer = load_language_model(arguments.checkpoint, getattr(arguments, "window", None))
    model = model.to(**placement)
    if not isinstance(model, RecurrentReformer) and model.hf_origin is not None:
        sys.stderr.write(f"memtx: {describe_window(model)}\n")
    return model, tokenizer


def describe_window(model: MemoryTransformer) -> str:
    """Return a sentence that says how many tokens a model sees exactly, and how large its state is."""
    from memtx.memory.recurrent import RecurrentMemory

    memories = [block.attention.memory for block in cast("list[Block]", list(model.blocks))]
    layers = Counter(int(memory.window) for memory in memories if isinstance(memory, RecurrentMemory))
    window, trained_length = (
        max(layers, default=0),
        max(getattr(memory, "trained_length", 0) or 0 for memory in memories),
    )
    trained = f"trained on {trained_length:,}" if trained_length not in (0, window) else "as trained"
    parts = [f"the last {window:,} tokens exactly ({trained})"]
    parts += [f"{other:,} in {layers[other]} of {model.depth} layers" for other in sorted(layers, reverse=True)[1:]]
    state_bytes = model.init_state(1, device="meta").nbytes
    return f"the model sees {', '.join(parts)}; its state takes {state_bytes / 1e6:,.1f} MB; --window N changes it"


def load_task_predictor(arguments: argparse.Namespace) -> BasePredictor:
    """Load the task model from ``--checkpoint``, as :func:`load_model` does."""
    placement = get_placement(arguments)
    from memtx.inference.predictor import load_predictor
    from memtx.inference.published_tasks import get_published_task, load_published_predictor

    with user_modules(arguments.modules):
        path = arguments.checkpoint
        predictor: BasePredictor
        predictor = load_published_predictor(path) if get_published_task(path) else load_predictor(path)
    predictor.model.to(**placement)
    return predictor


def load_reader(arguments: argparse.Namespace) -> StreamReader:
    """Return a reader at the start of a text, with model and tokenizer from :func:`load_model`."""
    from memtx.inference.reader import StreamReader

    parse_special = getattr(arguments, "parse_special", False)
    return StreamReader(*load_model(arguments), arguments.segment_length, parse_special=parse_special)


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, *, completed: int = 0, in_bytes: bool = False
) -> Iterator[ProgressUpdate]:
    """Show a progress bar on stderr if it is a terminal, and yield the function ``advance(amount, note="")``.

    ``total`` is the amount of work (None if unknown), of which ``completed`` is done. If ``in_bytes`` is True, amounts
    are bytes and their rate is shown.
    """
    if not sys.stderr.isatty():
        yield lambda amount, note="": None
        return
    from rich import progress
    from rich.console import Console

    bytes_columns = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    amount_columns = bytes_columns if in_bytes else (progress.MofNCompleteColumn(),)
    columns = (progress.TextColumn(description), progress.BarColumn(), *amount_columns)
    columns += (progress.TextColumn("{task.fields[note]}"), progress.TimeRemainingColumn())
    # Lines printed to a terminal go above the bar; lines printed to a file stay in it.
    redirect, console = sys.stdout.isatty(), Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task("", total=total, completed=completed, note="")
        yield lambda amount, note="": bar.update(task, advance=amount, note=note)


def print_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(column, justify="right" if index else "left") for index, column in enumerate(columns)))
    for cells in lines:
        table.add_row(*cells)
    Console().print(table)


def command_line(*words: str) -> str:
    """Return a command line of this program, quoted for a shell; the program is named as it can be typed here."""
    script = sys.argv[0]
    is_module = script.endswith("__main__.py")
    path = sys.executable if is_module else script
    name = Path(path).name
    is_on_path = not Path(path).exists() or (name and shutil.which(name) == str(Path(path).absolute()))
    return shlex.join([name if is_on_path else path, *(["-m", "memtx"] if is_module else []), *words])


def _with_local_checkpoint(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments after downloading a ``--checkpoint`` of the hub, which is its folder from then on."""
    from memtx.checkpoint import hub

    name = getattr(arguments, "checkpoint", None)
    if isinstance(name, str) and hub.is_repo_id(name):
        arguments.checkpoint = str(hub.download(name))
        if getattr(arguments, "served_model_name", "") is None:
            arguments.served_model_name = name.rpartition("/")[2].partition("@")[0]
    return arguments


def checkpoint_words(arguments: argparse.Namespace) -> list[str]:
    """Return ``--checkpoint`` and ``--import`` as they were given, for the next command."""
    modules = [word for module in arguments.modules for word in ("--import", module)]
    return ["--checkpoint", arguments.checkpoint, *modules]


def print_next_command(purpose: str, *words: str, is_data: bool = False, stderr: bool = False) -> None:
    """Print the command to type next.

    If ``is_data`` is True, stdout holds data for other programs: the line goes to stderr, and only to a terminal.
    """
    if not is_data or sys.stderr.isatty():
        (sys.stderr if is_data or stderr else sys.stdout).write(f"{purpose}: {command_line(*words)}\n")


def write_json_output(path: str | None, value: Any) -> None:
    """Write the value of ``--json``: to a file, to stdout for ``-``, or not at all for None."""
    if path == "-":
        sys.stdout.write(json.dumps(value) + "\n")
    elif path is not None:
        files.write_json(path, value)
