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

from memtx.cli.common import Parser, check_target, run
from memtx.errors import CheckpointError, DataError, MemtxError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from memtx.cli.report import Report
    from memtx.data.tokenizers import Tokenizer
    from memtx.inference.reader import StreamReader
    from memtx.models.memory_transformer import MemoryTransformer

CHUNK = 1 << 14
"""Bytes read at a time; at most what a reader takes in at once, so that Ctrl-C need not wait for all of it."""

DTYPES = ("float32", "bfloat16", "float64")


def _parser() -> Parser:
    parser = Parser("memtx read", "Read a book of any length at constant memory and report how surprising it was.")
    parser.add_argument("book", help="a UTF-8 text file, or - for standard input")
    add_checkpoint(parser)
    parser.add_argument("--segment", type=int, default=512, help="tokens read at once")
    parser.add_argument("--every", type=int, default=10_000, help="tokens between two lines of the report; 0 for none")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    parser.add_argument("--plot", metavar="PNG", help="draw surprise along the book and loss by position")
    parser.add_argument(
        "--session", metavar="FILE", help="go on from this file if it exists, and save there where reading ended"
    )
    add_device(parser)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the option for what is loaded."""
    parser.add_argument(
        "--checkpoint", required=True, help="a .ckpt file, a run's folder (its best is taken) or a pretrained folder"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options for where and how precisely to compute."""
    parser.add_argument("--device", default="cpu", help="where to compute, such as cpu, cuda or cuda:1")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of weights and state; the checkpoint's by default")
    add_import(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the option for classes of one's own."""
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module with classes of your own that the checkpoint names, from here or PYTHONPATH; repeatable",
    )


def import_modules(names: list[str]) -> None:
    """Import what a checkpoint's own classes are in: they are never imported because a file asks for it.

    Raises:
        MemtxError: there is no such module.
    """
    if names and (here := str(Path.cwd())) not in sys.path:
        # Last, so that it hides nothing.
        sys.path.append(here)
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise MemtxError(f"--import {name} failed: {error}.", "Is its folder in PYTHONPATH?") from error


def placed(device: str) -> torch.device:
    """Return the device of that name.

    Raises:
        MemtxError: it cannot be used.
    """
    import torch

    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise MemtxError(f"--device {device} cannot be used: {str(error).splitlines()[0]}", "Try cpu.") from error
    return place


@contextlib.contextmanager
def hinting_import() -> Iterator[None]:
    """Add to the complaint about a class of one's own what loads it."""
    try:
        yield
    except CheckpointError as error:
        if "was not imported" not in error.what:
            raise
        raise CheckpointError(error.what, "If you trust it, add --import and the module's name.") from error


def open_model(arguments: argparse.Namespace) -> tuple[MemoryTransformer, Tokenizer]:
    """Load the checkpoint that the arguments name, onto their device and in their precision.

    Raises:
        MemtxError: the checkpoint cannot be used, or there is no such device.
    """
    if arguments.segment < 1:
        raise MemtxError(f"--segment is {arguments.segment}, expected at least 1.")
    import_modules(arguments.modules)
    place = placed(arguments.device)
    import torch

    from memtx.inference.loading import load

    with hinting_import():
        model, tokenizer = load(arguments.checkpoint)
    model.to(device=place, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None)
    return model, tokenizer


def open_reader(arguments: argparse.Namespace) -> StreamReader:
    """Load the checkpoint that the arguments name and return a reader at the beginning of a text.

    Raises:
        MemtxError: the checkpoint cannot be used, or there is no such device.
    """
    model, tokenizer = open_model(arguments)
    from memtx.inference.reader import StreamReader

    return StreamReader(model, tokenizer, arguments.segment)


class _Book:
    """The book's bytes, and a digest of those taken, by which a session knows its book again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size: int | None = None
        self.taken = 0
        self.digest = hashlib.sha256()
        self._handle: IO[bytes] | None = None

    def open(self, stack: contextlib.ExitStack) -> None:
        if self.name == "-":
            self._handle = sys.stdin.buffer
            return
        self._handle = stack.enter_context(Path(self.name).open("rb"))  # noqa: SIM115 (the stack closes it)
        if Path(self.name).is_file():
            self.size = os.fstat(self._handle.fileno()).st_size
            if not self.size:
                raise self.empty()

    def empty(self) -> DataError:
        name = "Standard input" if self.name == "-" else f"'{self.name}'"
        return DataError(f"{name} is empty.", "Give a text.")

    def chunks(self, limit: int | None = None) -> Iterator[bytes]:
        """Yield the bytes that follow, at most ``limit``; a chunk counts as taken once the next is asked for."""
        assert self._handle is not None
        left = limit
        while chunk := self._handle.read(CHUNK if left is None else min(CHUNK, left)):
            yield chunk
            self.taken += len(chunk)
            self.digest.update(chunk)
            left = None if left is None else left - len(chunk)

    def skip(self, count: int, digest: str, session: str) -> None:
        """Pass over what a session has read.

        Raises:
            DataError: the book begins otherwise.
        """
        for _ in self.chunks(count):
            pass
        if self.taken != count or self.digest.hexdigest() != digest:
            raise DataError(
                f"'{session}' is a session of another text: it has read {count} bytes that '{self.name}' does not "
                "begin with.",
                "Give that text, or another session file.",
            )


@contextlib.contextmanager
def _held_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising: a segment is read whole or not at all, so that a session can be saved."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:  # Asked twice: at once.
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # Not the main thread: signals are someone else's.
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _read(arguments: argparse.Namespace) -> int:
    if arguments.every < 0:
        raise MemtxError(f"--every is {arguments.every}, expected at least 0 (0 for no lines).")
    for option in ("plot", "session"):
        target = getattr(arguments, option)
        if target:
            check_target(option, target)
    with contextlib.ExitStack() as stack:
        book = _Book(arguments.book)
        book.open(stack)  # Before torch and the model are loaded: a mistyped name should not cost seconds.
        from memtx.cli.report import Report, print_totals, progress_bar

        reader = open_reader(arguments)
        bar = progress_bar()
        report = Report(arguments.every, arguments.json, bar)
        if arguments.session and Path(arguments.session).exists():
            _resume(arguments.session, reader, report, book)
        asked = stack.enter_context(_held_interrupt())
        if bar is not None:
            stack.enter_context(bar)
        seconds, read = _pass(book, reader, report, bar, asked)
        if not asked:
            _check_end(reader, book)
        if arguments.session:
            # Before the end is read out: the text may go on, in this file or in what is generated.
            _save(arguments.session, reader, report, book)
        if asked:
            raise KeyboardInterrupt(
                f"saved in '{arguments.session}' after {book.taken:,} bytes; the same command goes on from there"
                if arguments.session
                else "nothing was saved (--session FILE would have)"
            )
        started = time.perf_counter()
        before = reader.totals.tokens
        for result in reader.finish():
            report.add(result)
        seconds += time.perf_counter() - started
        read += reader.totals.tokens - before
    report.finish()
    print_totals(arguments.json, reader, read / seconds if seconds else 0.0)
    if arguments.plot:
        from memtx.plots import surprise

        title = Path(arguments.book).stem if arguments.book != "-" else "standard input"
        surprise(arguments.plot, report.along.points(), report.by_position.points(), title=title)
    return 0


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the book in what its text's decoder found wrong."""
    try:
        yield
    except DataError as error:
        source = "standard input" if name == "-" else f"'{name}'"
        raise DataError(f"{source}: {error.what}", error.cure) from error


def _pass(
    book: _Book, reader: StreamReader, report: Report, bar: Progress | None, asked: list[int]
) -> tuple[float, int]:
    """Read the book up to its end or Ctrl-C; return the seconds it took and the tokens read."""
    task = bar.add_task("", total=book.size, completed=book.taken, rate=0.0) if bar is not None else None
    started, first = time.perf_counter(), reader.totals.tokens
    with _named(book.name):
        for chunk in book.chunks():
            for result in reader.feed(chunk):
                report.add(result)
                if bar is not None and task is not None:
                    rate = (result.end - first) / max(time.perf_counter() - started, 1e-9)
                    bar.update(task, completed=reader.totals.bytes, rate=rate)
                if asked:
                    # The rest of the chunk was taken in and waits in the reader, so it goes into the session.
                    break
            if asked:
                # Chunks count once the next is asked for, which does not happen here.
                book.taken += len(chunk)
                book.digest.update(chunk)
                break
    return time.perf_counter() - started, reader.totals.tokens - first


def _check_end(reader: StreamReader, book: _Book) -> None:
    """Refuse a text that is empty or ends inside a character, before anything is written."""
    if reader.snapshot().waiting_bytes:
        with _named(book.name):
            for _ in reader.fork().finish():
                pass
    if not reader.totals.bytes:
        raise book.empty()


def _save(path: str, reader: StreamReader, report: Report, book: _Book) -> None:
    from memtx.inference.session import save_session

    facts = {"taken": book.taken, "digest": book.digest.hexdigest(), "report": report.position()}
    save_session(path, reader, facts=facts, extras=report.tensors())


def _resume(path: str, reader: StreamReader, report: Report, book: _Book) -> None:
    from memtx.inference.session import load_session

    facts, extras = load_session(path, reader)
    try:
        taken, digest = int(facts["taken"]), str(facts["digest"])
        report.restore(facts["report"], extras)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is a session of something other than memtx read.", "Give another.") from error
    book.skip(taken, digest, path)


def main(argv: list[str]) -> int:
    """Run ``memtx read`` with its arguments and return the exit code."""
    arguments = _parser().parse(argv)
    return run(lambda: _read(arguments), traceback=arguments.traceback)
