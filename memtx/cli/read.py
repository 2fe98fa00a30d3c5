"""``memtx read``: read a book of any length at constant memory and report how surprising it was."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from memtx.cli.options import Parser, check_output_path, run
from memtx.errors import CheckpointError, DataError, MemtxError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from memtx.cli.report import ReadingReport
    from memtx.data.tokenizers import Tokenizer
    from memtx.inference.reader import StreamReader
    from memtx.models.memory_transformer import MemoryTransformer

CHUNK_BYTES = 1 << 14
"""Bytes read at a time; at most what a reader takes in at once, so that Ctrl-C need not wait for all of it."""

DTYPES = ("float32", "bfloat16", "float64")


def _build_parser() -> Parser:
    parser = Parser("memtx read", "Read a book of any length at constant memory and report how surprising it was.")
    parser.add_argument("book", help="a UTF-8 text file, or - for standard input")
    add_checkpoint_option(parser)
    parser.add_argument("--segment-length", type=int, default=512, help="tokens read at once")
    parser.add_argument(
        "--report-every", type=int, default=10_000, help="tokens between two lines of the report; 0 for none"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--plot", metavar="PNG", help="draw surprisal along the book and loss by position")
    parser.add_argument(
        "--session", metavar="FILE", help="go on from this file if it exists, and save there where reading ended"
    )
    add_device_options(parser)
    return parser


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for what is loaded."""
    parser.add_argument(
        "--checkpoint", required=True, help="a .ckpt file, a run's folder (its best is taken) or a pretrained folder"
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for where and how precisely to compute."""
    parser.add_argument("--device", default="cpu", help="where to compute, such as cpu, cuda or cuda:1")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of weights and state; the checkpoint's by default")
    add_import_option(parser)


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for classes of one's own."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module with classes of your own that the checkpoint names, from here or PYTHONPATH; repeatable",
    )


def import_modules(module_names: list[str]) -> None:
    """Import what a checkpoint's own classes are in: they are never imported because a file asks for it.

    Raises:
        MemtxError: there is no such module.
    """
    if module_names and (here := str(Path.cwd())) not in sys.path:
        # Last, so that it hides nothing.
        sys.path.append(here)
    for name in module_names:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise MemtxError(f"--import {name} failed: {error}.", "Is its folder in PYTHONPATH?") from error


def resolve_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        MemtxError: it cannot be used.
    """
    import torch

    try:
        place = torch.device(name)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise MemtxError(f"--device {name} cannot be used: {str(error).splitlines()[0]}", "Try cpu.") from error
    return place


@contextlib.contextmanager
def suggest_import_option() -> Iterator[None]:
    """Add to the complaint about a class of one's own what loads it."""
    try:
        yield
    except CheckpointError as error:
        if "was not imported" not in error.message:
            raise
        raise CheckpointError(error.message, "If you trust it, add --import and the module's name.") from error


def load_model(arguments: argparse.Namespace) -> tuple[MemoryTransformer, Tokenizer]:
    """Load the checkpoint that the arguments name, onto their device and in their precision.

    Raises:
        MemtxError: the checkpoint cannot be used, or there is no such device.
    """
    if arguments.segment_length < 1:
        raise MemtxError(f"--segment-length is {arguments.segment_length}, expected at least 1.")
    import_modules(arguments.modules)
    place = resolve_device(arguments.device)
    import torch

    from memtx.checkpoint.load import load_model_and_tokenizer

    with suggest_import_option():
        model, tokenizer = load_model_and_tokenizer(arguments.checkpoint)
    model.to(device=place, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None)
    return model, tokenizer


def load_reader(arguments: argparse.Namespace) -> StreamReader:
    """Load the checkpoint that the arguments name and return a reader at the beginning of a text.

    Raises:
        MemtxError: the checkpoint cannot be used, or there is no such device.
    """
    model, tokenizer = load_model(arguments)
    from memtx.inference.reader import StreamReader

    return StreamReader(model, tokenizer, arguments.segment_length)


class _Book:
    """The book's bytes, and a digest of those taken, by which a session knows its book again."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size: int | None = None
        self.bytes_read = 0
        self.digest = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def open(self, stack: contextlib.ExitStack) -> None:
        if self.path == "-":
            self._file = sys.stdin.buffer
            return
        self._file = stack.enter_context(Path(self.path).open("rb"))  # noqa: SIM115 (the stack closes it)
        if Path(self.path).is_file():
            self.size = os.fstat(self._file.fileno()).st_size
            if not self.size:
                raise self.empty_error()

    def empty_error(self) -> DataError:
        name = "Standard input" if self.path == "-" else f"'{self.path}'"
        return DataError(f"{name} is empty.", "Give a text.")

    def chunks(self, max_bytes: int | None = None) -> Iterator[bytes]:
        """Yield the bytes that follow, at most ``max_bytes``; a chunk counts as taken once the next is asked for."""
        assert self._file is not None
        left = max_bytes
        while chunk := self._file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            yield chunk
            self.bytes_read += len(chunk)
            self.digest.update(chunk)
            left = None if left is None else left - len(chunk)

    def skip(self, num_bytes: int, digest: str, session: str) -> None:
        """Pass over what a session has read.

        Raises:
            DataError: the book begins otherwise.
        """
        for _ in self.chunks(num_bytes):
            pass
        if self.bytes_read != num_bytes or self.digest.hexdigest() != digest:
            raise DataError(
                f"'{session}' is a session of another text: it has read {num_bytes} bytes that '{self.path}' does not "
                "begin with.",
                "Give that text, or another session file.",
            )


@contextlib.contextmanager
def _defer_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising: a segment is read whole or not at all, so that a session can be saved."""
    asked: list[int] = []

    def on_sigint(number: int, _: object) -> None:
        if asked:  # Asked twice: at once.
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = signal.signal(signal.SIGINT, on_sigint)
    except ValueError:  # Not the main thread: signals are someone else's.
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _read(arguments: argparse.Namespace) -> int:
    if arguments.report_every < 0:
        raise MemtxError(f"--report-every is {arguments.report_every}, expected at least 0 (0 for no lines).")
    for option in ("plot", "session"):
        target = getattr(arguments, option)
        if target:
            check_output_path(option, target)
    with contextlib.ExitStack() as stack:
        book = _Book(arguments.book)
        book.open(stack)  # Before torch and the model are loaded: a mistyped name should not cost seconds.
        from memtx.cli.report import ReadingReport, print_totals, progress_bar

        reader = load_reader(arguments)
        bar = progress_bar()
        report = ReadingReport(arguments.report_every, arguments.json, bar)
        if arguments.session and Path(arguments.session).exists():
            _resume_session(arguments.session, reader, report, book)
        asked = stack.enter_context(_defer_interrupt())
        if bar is not None:
            stack.enter_context(bar)
        seconds, read = _read_book(book, reader, report, bar, asked)
        if not asked:
            _check_complete(reader, book)
        if arguments.session:
            # Before the end is read out: the text may go on, in this file or in what is generated.
            _save_session(arguments.session, reader, report, book)
        if asked:
            raise KeyboardInterrupt(
                f"saved in '{arguments.session}' after {book.bytes_read:,} bytes; the same command goes on from there"
                if arguments.session
                else "nothing was saved (--session FILE would have)"
            )
        started = time.perf_counter()
        before = reader.totals.num_tokens
        for result in reader.finish():
            report.add(result)
        seconds += time.perf_counter() - started
        read += reader.totals.num_tokens - before
    report.finish()
    print_totals(arguments.json, reader, read / seconds if seconds else 0.0)
    if arguments.plot:
        from memtx.plots import plot_surprisal

        title = Path(arguments.book).stem if arguments.book != "-" else "standard input"
        plot_surprisal(arguments.plot, report.surprisal_curve.points(), report.position_curve.points(), title=title)
    return 0


@contextlib.contextmanager
def _add_path_to_errors(path: str) -> Iterator[None]:
    """Name the book in what its text's decoder found wrong."""
    try:
        yield
    except DataError as error:
        source = "standard input" if path == "-" else f"'{path}'"
        raise DataError(f"{source}: {error.message}", error.hint) from error


def _read_book(
    book: _Book, reader: StreamReader, report: ReadingReport, progress: Progress | None, interrupts: list[int]
) -> tuple[float, int]:
    """Read the book up to its end or Ctrl-C; return the seconds it took and the tokens read."""
    task = progress.add_task("", total=book.size, completed=book.bytes_read, rate=0.0) if progress is not None else None
    started, first = time.perf_counter(), reader.totals.num_tokens
    with _add_path_to_errors(book.path):
        for chunk in book.chunks():
            for result in reader.feed(chunk):
                report.add(result)
                if progress is not None and task is not None:
                    rate = (result.end - first) / max(time.perf_counter() - started, 1e-9)
                    progress.update(task, completed=reader.totals.num_bytes, rate=rate)
                if interrupts:
                    # The rest of the chunk was taken in and waits in the reader, so it goes into the session.
                    break
            if interrupts:
                # Chunks count once the next is asked for, which does not happen here.
                book.bytes_read += len(chunk)
                book.digest.update(chunk)
                break
    return time.perf_counter() - started, reader.totals.num_tokens - first


def _check_complete(reader: StreamReader, book: _Book) -> None:
    """Refuse a text that is empty or ends inside a character, before anything is written."""
    if reader.snapshot().pending_bytes:
        with _add_path_to_errors(book.path):
            for _ in reader.fork().finish():
                pass
    if not reader.totals.num_bytes:
        raise book.empty_error()


def _save_session(path: str, reader: StreamReader, report: ReadingReport, book: _Book) -> None:
    from memtx.inference.sessions.file import save_session

    facts = {"bytes_read": book.bytes_read, "text_sha256": book.digest.hexdigest(), "report": report.state_dict()}
    save_session(path, reader, metadata=facts, extra_tensors=report.state_tensors())


def _resume_session(path: str, reader: StreamReader, report: ReadingReport, book: _Book) -> None:
    from memtx.inference.sessions.file import load_session

    facts, extras = load_session(path, reader)
    try:
        taken, digest = int(facts["bytes_read"]), str(facts["text_sha256"])
        report.load_state(facts["report"], extras)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is a session of something other than memtx read.", "Give another.") from error
    book.skip(taken, digest, path)


def main(argv: list[str]) -> int:
    """Run ``memtx read`` with its arguments and return the exit code."""
    arguments = _build_parser().parse(argv)
    return run(lambda: _read(arguments), traceback=arguments.traceback)
