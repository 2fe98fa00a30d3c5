"""What a task is to a model: examples as rows of tokens, and scores as answers.

A kind of task (``memtx.data.classes``, ``tags``, ``questions``) says how its examples are laid out in a row, which
tokens are global in it (Longformer, Beltagy et al. 2020, section 3.1), and what the scores of a model mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memtx.data.batch import IGNORED
from memtx.data.offset_tokenizers import Encoded, OffsetTokenizer
from memtx.errors import DataError, nearest

Array = NDArray[np.int64]
Scores = NDArray[np.float32]


class Window:
    """A row of a batch: an example, or a part of one that is longer than the model reads at once.

    No dataclass, because Lightning looks into those for tensors.

    Attributes:
        ids: (length,) the tokens, marks among them.
        types: (length,) 0 for the first text and 1 for the second.
        marked: (length,) bool, tokens that are global.
        first: place in the row of the first token of the part.
        begin: number, within the text that may be cut, of that token.
        stop: number of the token behind the part's last.
        target: what is to be learned; of no meaning where the example has no label.
    """

    def __init__(
        self,
        ids: Array,
        types: Array,
        marked: NDArray[np.bool_],
        first: int,
        begin: int,
        stop: int,
        target: Array | None = None,
    ) -> None:
        self.ids, self.types, self.marked = ids, types, marked
        self.first, self.begin, self.stop = first, begin, stop
        self.target = target


class Task(ABC):
    """A kind of task; its examples are of a class of :mod:`memtx.data.examples`.

    Args:
        labels: what is told apart, in order; None for what the training examples have.
        longest: tokens that the model reads at once, marks among them.
        stride: tokens from the beginning of one window to the next in a text that is longer; None to refuse it.

    Raises:
        DataError: a number is out of range, or labels repeat.
    """

    kind: ClassVar[str]
    """Names the kind in a checkpoint."""

    def __init__(self, labels: Sequence[str] | None = None, longest: int = 512, stride: int | None = None) -> None:
        if longest < 8:
            raise DataError(f"longest is {longest}, expected at least 8 tokens.", "Change --data.task.longest.")
        if stride is not None and not 1 <= stride < longest:
            raise DataError(f"stride is {stride}, expected 1 to {longest - 1}.", "Change --data.task.stride.")
        self.labels = tuple(labels or ())
        if len(set(self.labels)) < len(self.labels):
            raise DataError(f"labels repeat: {', '.join(self.labels)}.", "Name each once.")
        self.longest, self.stride = longest, stride

    @abstractmethod
    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> Any:
        """Return a record as an example; raises DataError."""

    @abstractmethod
    def from_text(self, text: str) -> Any:
        """Return a raw text as an example without a label.

        Raises:
            DataError: the kind needs more than one text.
        """

    @abstractmethod
    def texts(self, example: Any) -> tuple[str, ...]:
        """Return the texts to be encoded."""

    @abstractmethod
    def named(self, example: Any) -> tuple[str, ...]:
        """Return the labels that an example bears."""

    @property
    def outputs(self) -> int:
        """Scores that a model gives, a row or a token."""
        return len(self.labels)

    def learn(self, examples: Iterable[Any]) -> None:
        """Take the labels of examples, in alphabetical order, where none were given."""
        if not self.labels:
            self.labels = tuple(sorted({label for example in examples for label in self.named(example)}))

    def number(self, label: str) -> int:
        """Return a label's number.

        Raises:
            DataError: there is no such label.
        """
        try:
            return self.labels.index(label)
        except ValueError:
            known = ", ".join(self.labels[:20])
            raise DataError(
                f"The label '{label}' was never seen in training, known are {known}.{nearest(label, self.labels)}",
                "Correct it, or train with examples of it.",
            ) from None

    @abstractmethod
    def windows(self, example: Any, encoded: Sequence[Encoded], marks: OffsetTokenizer) -> list[Window]:
        """Return an example's rows.

        Raises:
            DataError: it is longer than the model reads and no stride is given, or a label is unknown.
        """

    @abstractmethod
    def decide(
        self, example: Any, encoded: Sequence[Encoded], windows: Sequence[Window], scores: Sequence[Scores]
    ) -> dict[str, Any]:
        """Return what the model says of an example, as JSON can hold it.

        Args:
            example: with or without a label.
            encoded: of its texts.
            windows: its rows.
            scores: of each row, (outputs,) or (length, outputs), unnormalised.
        """

    def cut(self, count: int, taken: int) -> list[tuple[int, int]]:
        """Return the windows (from, to) of a text of ``count`` tokens in rows where ``taken`` places are not for it.

        Raises:
            DataError: it does not fit and no stride is given, or nothing would fit.
        """
        room = self.longest - taken
        if count <= room:
            return [(0, count)]
        if self.stride is None:
            raise DataError(
                f"The text has {count} tokens, {room} fit into what the model reads at once ({self.longest}).",
                "Give --data.task.stride to cut it into overlapping windows, or a model with more positions and "
                "--data.task.longest.",
            )
        if room < self.stride:
            raise DataError(
                f"Beside {taken} other tokens {room} of the text fit into {self.longest}, less than the stride "
                f"{self.stride}.",
                "Lower --data.task.stride, or raise --data.task.longest.",
            )
        # The last window is as long as the others: what ends a text is read with what comes before it.
        begins = [*range(0, count - room, self.stride), count - room]
        return [(begin, begin + room) for begin in begins]

    def description(self) -> dict[str, Any]:
        """Return what makes the task anew, as JSON can hold it."""
        return {"kind": self.kind, "labels": list(self.labels), "longest": self.longest, "stride": self.stride}


def laid_out(
    marks: OffsetTokenizer, first: Array, second: Array | None = None
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return ids, types and global tokens of ``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]``.

    ``[CLS]`` is global.
    """
    parts = [np.array([marks.begin]), first, np.array([marks.end])]
    types = [np.zeros(len(first) + 2, dtype=np.int64)]
    if second is not None:
        parts += [second, np.array([marks.end])]
        types.append(np.ones(len(second) + 1, dtype=np.int64))
    ids = np.concatenate(parts).astype(np.int64)
    marked = np.zeros(len(ids), dtype=np.bool_)
    marked[0] = True
    return ids, np.concatenate(types), marked


def normalised(scores: Scores) -> NDArray[np.float64]:
    """Return the softmax over the last axis, float64."""
    shifted = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    powers = np.exp(shifted)
    out: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return out


NOTHING = np.array([IGNORED], dtype=np.int64)
"""The target of an example without a label."""
