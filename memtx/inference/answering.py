"""What answers inputs one request at a time: whose turn it is, until when, and which input is wrong."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from memtx.errors import DataError
from memtx.inference.engine import ClosedError, OutOfTimeError, seconds_left

T = TypeVar("T")

Input = str | Mapping[str, Any]
"""A raw text, or the fields of an example; labels may be left out."""


class Answering(ABC):
    """A model that may be asked from several threads, which take turns.

    Attributes:
        kind: what it does, in a word.
        model: in eval mode, on any device.
        tokens_read: so far.
    """

    kind: str
    model: nn.Module

    def __init__(self) -> None:
        self.tokens_read = 0
        self._turn = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Answer no more: what is being worked on ends with an error at its next call of the model."""
        self._closed = True

    @abstractmethod
    def example(self, given: Input) -> Any:
        """Return one input as an example without a label.

        Raises:
            DataError: it is not what the task takes.
        """

    @abstractmethod
    def predict(self, inputs: Sequence[Input], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return what the model says of each input, as JSON can hold it.

        Args:
            inputs: raw texts or fields of examples.
            deadline: a time of ``time.monotonic`` by which to be done; None for none.

        Raises:
            DataError: an input is not what the task takes, or too long; names its place.
            OutOfTimeError: the deadline passed.
            ClosedError: it was closed.
        """

    def _each(self, inputs: Sequence[Input], make: Callable[[Input], T]) -> list[T]:
        """Make something of every input; of several the one that is wrong is named by its place."""
        made = []
        for place, given in enumerate(inputs):
            try:
                made.append(make(given))
            except DataError as error:
                where = f"Input {place}: " if len(inputs) > 1 else ""
                raise DataError(f"{where}{error.what}", error.cure) from error
        return made

    @contextlib.contextmanager
    def _in_turn(self, deadline: float | None) -> Iterator[None]:
        left = seconds_left(deadline)
        if not self._turn.acquire(timeout=-1 if left is None else left):
            raise OutOfTimeError("The request took longer than it may.", "Ask for less at once.")
        try:
            yield
        finally:
            self._turn.release()

    def _go_on(self, deadline: float | None) -> None:
        """Raise if there is no more time, or it was closed."""
        seconds_left(deadline)
        if self._closed:
            raise ClosedError("The server is closing.", "Ask again when it is back.")
