"""Request deadlines, in ``time.monotonic`` seconds, and errors that end a request early."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from memtx.errors import MemtxError


class DeadlineExceededError(MemtxError):
    """A request ran past its deadline."""

    def __init__(self, message: str = "The request timed out.") -> None:
        super().__init__(message, "Send less text or raise --max-seconds.")


class ClosedError(MemtxError):
    """The engine or predictor was closed before the request was done."""


def remaining_seconds(deadline: float | None) -> float | None:
    """Return the seconds left until ``deadline``, or None; raises DeadlineExceededError if it has passed."""
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DeadlineExceededError
    return seconds


@contextlib.contextmanager
def acquire_before(
    deadline: float | None, lock: threading.Lock, message: str = "The request timed out."
) -> Iterator[None]:
    """Hold ``lock``; raise DeadlineExceededError with ``message`` if it is not free before the deadline."""
    seconds = remaining_seconds(deadline)
    if not lock.acquire(timeout=-1 if seconds is None else seconds):
        raise DeadlineExceededError(message)
    try:
        yield
    finally:
        lock.release()
