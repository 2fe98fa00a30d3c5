"""Output of ``memtx predict``: whole lines, in a file that can be continued after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from memtx import files
from memtx.errors import DataError, MemtxError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C only after the block, or at once for a second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []

    def handle(number: int, frame: Any) -> None:
        interrupts.append(number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupts:
        raise KeyboardInterrupt


class PredictionOutput:
    """Writes predictions as JSON lines to stdout, or to ``FILE.partial``, which becomes FILE at the end.

    After an error or Ctrl-C the partial file stays, with whole lines, and the error says how to continue.

    Args:
        path: The file. None for stdout.
        resume: If True, continue the partial file, if there is one.

    Raises:
        MemtxError: There is a partial file, and it is not to be continued.
    """

    def __init__(self, path: str | None, resume: bool = False) -> None:
        self.path, self.num_lines = None if path is None else Path(path), 0
        if resume and path is None:
            raise MemtxError("--resume continues a file.", "Name it with --output.")
        if self.path is None:
            return
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        if self._partial.exists() and not resume:
            message = f"'{self._partial}' holds the lines of an interrupted run."
            raise MemtxError(message, "Continue it with --resume, or remove it.")

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file: IO[bytes] = open(self._partial, "ab+")
            self.num_lines = _drop_incomplete_line(self._file)
        return self

    def write(self, predictions: Sequence[dict[str, Any]]) -> None:
        """Write a line for each prediction; an interruption leaves no part of one."""
        content = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions).encode()
        file = sys.stdout.buffer if self.path is None else self._file
        with deferred_interrupt():
            try:
                file.write(content)
                file.flush()
            except OSError as error:
                if self.path is None:
                    raise
                raise files.write_failed_error(self._partial, error) from error
            self.num_lines += len(predictions)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.path is None:
            return
        if error is None:
            os.fsync(self._file.fileno())
        self._file.close()
        if error is None:
            files.replace(self._partial, self.path)
        elif not self.num_lines:
            self._partial.unlink()
        else:
            note = f"{self.num_lines:,} lines are in '{self._partial}'; the same command with --resume continues."
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(note) from error
            if isinstance(error, DataError):
                raise DataError(error.message, f"{error.hint} {note}".strip()) from error


def _drop_incomplete_line(file: IO[bytes]) -> int:
    """Cut what follows the last newline, and return the number of lines."""
    file.seek(0)
    num_lines = size = 0
    for line in file:
        if line.endswith(b"\n"):
            num_lines, size = num_lines + 1, size + len(line)
    file.truncate(size)
    return num_lines
