"""``memtx read``: read a text of any length with constant memory and report its surprisal."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memtx.cli import options
from memtx.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from memtx.cli.report import ReadingReport
    from memtx.inference.reader import StreamReader

CHUNK_BYTES = 1 << 14
"""Bytes per read of the file; small, because Ctrl-C waits until the reader has processed the current chunk."""


class _Book:
    """Text as bytes, and the digest of those read so far, which ties a session to its text."""

    def __init__(self, path: str, stack: contextlib.ExitStack) -> None:
        self.name = options.input_name(path)
        self.bytes_read, self.digest = 0, hashlib.sha256()
        self._file: IO[bytes] = sys.stdin.buffer
        if path != "-":
            self._file = stack.enter_context(Path(path).open("rb"))  # noqa: SIM115 (the stack closes it)
        self.size = os.fstat(self._file.fileno()).st_size if path != "-" and Path(path).is_file() else None
        if self.size == 0:
            raise self.empty_error()

    def empty_error(self) -> DataError:
        return DataError(f"{self.name[:1].upper()}{self.name[1:]} is empty.", "Give a text.")

    def chunks(self, max_bytes: int = sys.maxsize) -> Iterator[bytes]:
        """Yield the next chunks, of at most ``max_bytes`` in total."""
        while chunk := self._file.read(min(CHUNK_BYTES, max_bytes)):
            self.bytes_read += len(chunk)
            self.digest.update(chunk)
            max_bytes -= len(chunk)
            yield chunk

    def skip(self, num_bytes: int, digest: str, session: str) -> None:
        """Skip the bytes that a session has read; raise DataError if they differ."""
        for _ in self.chunks(num_bytes):
            pass
        if self.bytes_read == num_bytes and self.digest.hexdigest() == digest:
            return
        message = f"'{session}' belongs to another text: {self.name} does not start with the {num_bytes} bytes read."
        raise DataError(message, "Give that text, or another session file.")


@contextlib.contextmanager
def _defer_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it, so that reading stops between segments and the session can be saved."""
    interrupts: list[int] = []

    def on_sigint(signum: int, _: object) -> None:
        if interrupts:  # the second one stops at once
            raise KeyboardInterrupt
        interrupts.append(signum)

    is_main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
    previous = signal.signal(signal.SIGINT, on_sigint) if is_main else None
    try:
        yield interrupts
    finally:
        if is_main:
            signal.signal(signal.SIGINT, previous)


def _read(arguments: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        book = _Book(arguments.book, stack)  # before torch and the model are loaded: a wrong path fails at once
        from memtx.cli.report import ReadingReport, print_totals

        reader, session = options.load_reader(arguments), arguments.session
        report = ReadingReport(arguments.report_every, arguments.json)
        if session and Path(session).exists():
            _resume_session(session, reader, report, book)
        interrupts = stack.enter_context(_defer_interrupt())
        first_token = reader.totals.num_tokens
        seconds = _read_book(book, reader, report, interrupts)
        if not interrupts:
            _check_complete(reader, book)
        if session:
            from memtx.inference.sessions.file import save_session

            # Saved before the end of the text is flushed, because the next call may continue the text.
            metadata: dict[str, Any] = {"bytes_read": book.bytes_read, "text_sha256": book.digest.hexdigest()}
            metadata["report"] = report.state_dict()
            save_session(session, reader, metadata=metadata, extra_tensors=report.state_tensors())
        if interrupts:
            saved = f"saved in '{session}' after {book.bytes_read:,} bytes; run the same command to resume"
            raise KeyboardInterrupt(saved if session else "nothing was saved; --session FILE saves the state")
        start = time.perf_counter()
        for result in reader.finish():
            report.add(result)
        seconds += time.perf_counter() - start
    report.finish()
    tokens = reader.totals.num_tokens - first_token
    print_totals(arguments.json, reader, tokens / seconds if seconds else 0.0)
    if arguments.plot:
        from memtx.plots import plot_surprisal

        title = Path(arguments.book).stem if arguments.book != "-" else book.name
        plot_surprisal(arguments.plot, report.surprisal_curve.points(), report.position_curve.points(), title=title)
    source = ["--session", session] if session else ["--prompt-file", arguments.book]
    if session or arguments.book != "-":
        words = ("generate", *options.checkpoint_words(arguments), *source)
        options.print_next_command("Continue the text with", *words, is_data=arguments.json, stderr=True)


def _read_book(book: _Book, reader: StreamReader, report: ReadingReport, interrupts: list[int]) -> float:
    """Read the text up to its end or Ctrl-C and return the seconds that it took."""
    start, first_token, num_bytes = time.perf_counter(), reader.totals.num_tokens, reader.totals.num_bytes
    bar = options.progress_bar("reading", book.size, completed=book.bytes_read, in_bytes=True)
    with options.name_in_errors(book.name), bar as advance:
        for result in (result for chunk in book.chunks() for result in reader.feed(chunk)):
            report.add(result)
            rate = (result.end - first_token) / max(time.perf_counter() - start, 1e-9)
            advance(reader.totals.num_bytes - num_bytes, f"{rate:>7,.0f} tokens/s")
            num_bytes = reader.totals.num_bytes
            if interrupts:  # the reader holds the rest of the chunk, which goes into the session
                break
    return time.perf_counter() - start


def _check_complete(reader: StreamReader, book: _Book) -> None:
    """Raise if the text is empty or ends inside a character, before anything is written."""
    if reader.snapshot().pending_bytes:
        with options.name_in_errors(book.name):
            for _ in reader.fork().finish():
                pass
    if not reader.totals.num_bytes:
        raise book.empty_error()


def _resume_session(path: str, reader: StreamReader, report: ReadingReport, book: _Book) -> None:
    from memtx.inference.sessions.file import load_session

    parse_special = reader.parse_special
    metadata, tensors = load_session(path, reader)
    reader.parse_special = parse_special
    try:
        bytes_read, digest = int(metadata["bytes_read"]), str(metadata["text_sha256"])
        report.load_state(metadata["report"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a session of memtx read.", "Give another file.") from error
    book.skip(bytes_read, digest, path)


def main(argv: list[str]) -> int:
    """Run ``memtx read``."""
    parser = options.Parser("memtx read", "Read a text of any length with constant memory and report its surprisal.")
    add = parser.add_argument
    add("book", help="UTF-8 text file, or - for standard input")
    parser.add_model_options(window=True)
    parser.add_parse_special_option()
    add("--report-every", type=options.non_negative_int, default=10_000, help="tokens per report line; 0 disables it")
    add("--json", action="store_true", help="print one JSON object instead of the report")
    add("--plot", type=options.output_path, metavar="PNG", help="plot surprisal along the text")
    add("--session", type=options.output_path, metavar="FILE", help="file to resume from, if it exists, and to save to")
    return parser.run(argv, _read)
