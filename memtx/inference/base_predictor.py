"""What answers inputs one request at a time: whose turn it is, until when, and which input is wrong."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from memtx.errors import DataError
from memtx.inference.engine import ClosedError, DeadlineExceededError, remaining_seconds

T = TypeVar("T")

PredictInput = str | Mapping[str, Any]
"""A raw text, or the fields of an example; labels may be left out."""


class BasePredictor(ABC):
    """A model that may be asked from several threads, which take turns.

    Attributes:
        task_name: what it does, in a word.
        model: in eval mode, on any device.
        num_tokens_read: so far.
    """

    task_name: str
    model: nn.Module

    def __init__(self) -> None:
        self.num_tokens_read = 0
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Answer no more: what is being worked on ends with an error at its next call of the model."""
        self._closed = True

    @abstractmethod
    def to_example(self, raw_input: PredictInput) -> Any:
        """Return one input as an example without a label.

        Raises:
            DataError: it is not what the task takes.
        """

    @abstractmethod
    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return what the model says of each input, as JSON can hold it.

        Args:
            inputs: raw texts or fields of examples.
            deadline: a time of ``time.monotonic`` by which to be done; None for none.

        Raises:
            DataError: an input is not what the task takes, or too long; names its place.
            DeadlineExceededError: the deadline passed.
            ClosedError: it was closed.
        """

    def _map_inputs(self, inputs: Sequence[PredictInput], convert: Callable[[PredictInput], T]) -> list[T]:
        """Make something of every input; of several the one that is wrong is named by its place."""
        made = []
        for place, given in enumerate(inputs):
            try:
                made.append(convert(given))
            except DataError as error:
                where = f"Input {place}: " if len(inputs) > 1 else ""
                raise DataError(f"{where}{error.message}", error.hint) from error
        return made

    @contextlib.contextmanager
    def _exclusive(self, deadline: float | None) -> Iterator[None]:
        left = remaining_seconds(deadline)
        if not self._lock.acquire(timeout=-1 if left is None else left):
            raise DeadlineExceededError("The request took longer than it may.", "Ask for less at once.")
        try:
            yield
        finally:
            self._lock.release()

    def _check_active(self, deadline: float | None) -> None:
        """Raise if there is no more time, or it was closed."""
        remaining_seconds(deadline)
        if self._closed:
            raise ClosedError("The server is closing.", "Ask again when it is back.")
