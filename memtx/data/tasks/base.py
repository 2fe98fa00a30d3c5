"""A task for a model: examples encoded as token windows, and logits decoded as answers.

Each task type (classification, tagging, question answering) decides how its examples are laid out in a window, which
tokens are global (Longformer, Beltagy et al. 2020, section 3.1), and how the model's logits are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memtx.data.batch import IGNORE_INDEX
from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.errors import DataError, closest_match

IntArray = NDArray[np.int64]
Logits = NDArray[np.float32]


class EncodedExample:
    """A row of a batch: an example, or a part of one that is longer than the model reads at once.

    No dataclass, because Lightning looks into those for tensors.

    Attributes:
        ids: (length,) the tokens, marks among them.
        token_type_ids: (length,) 0 for the first text and 1 for the second.
        global_attention_mask: (length,) bool, tokens that are global.
        input_start: place in the row of the first token of the part.
        text_start: number, within the text that may be cut, of that token.
        text_stop: number of the token behind the part's last.
        target: what is to be learned; of no meaning where the example has no label.
    """

    def __init__(
        self,
        ids: IntArray,
        token_type_ids: IntArray,
        global_attention_mask: NDArray[np.bool_],
        input_start: int,
        text_start: int,
        text_stop: int,
        target: IntArray | None = None,
    ) -> None:
        self.ids, self.token_type_ids, self.global_attention_mask = ids, token_type_ids, global_attention_mask
        self.input_start, self.text_start, self.text_stop = input_start, text_start, text_stop
        self.target = target


class Task(ABC):
    """A kind of task; its examples are of a class of :mod:`memtx.data.tasks.examples`.

    Args:
        labels: what is told apart, in order; None for what the training examples have.
        max_length: tokens that the model reads at once, marks among them.
        stride: tokens from the beginning of one window to the next in a text that is longer; None to refuse it.

    Raises:
        DataError: a number is out of range, or labels repeat.
    """

    kind: ClassVar[str]
    """Names the kind in a checkpoint."""

    def __init__(self, labels: Sequence[str] | None = None, max_length: int = 512, stride: int | None = None) -> None:
        if max_length < 8:
            raise DataError(
                f"max_length is {max_length}, expected at least 8 tokens.", "Change --data.task.max_length."
            )
        if stride is not None and not 1 <= stride < max_length:
            raise DataError(f"stride is {stride}, expected 1 to {max_length - 1}.", "Change --data.task.stride.")
        self.labels = tuple(labels or ())
        if len(set(self.labels)) < len(self.labels):
            raise DataError(f"labels repeat: {', '.join(self.labels)}.", "Name each once.")
        self.max_length, self.stride = max_length, stride

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
    def get_texts(self, example: Any) -> tuple[str, ...]:
        """Return the texts to be encoded."""

    @abstractmethod
    def get_labels(self, example: Any) -> tuple[str, ...]:
        """Return the labels that an example bears."""

    @property
    def num_labels(self) -> int:
        """Scores that a model gives, a row or a token."""
        return len(self.labels)

    def fit_labels(self, examples: Iterable[Any]) -> None:
        """Take the labels of examples, in alphabetical order, where none were given."""
        if not self.labels:
            self.labels = tuple(sorted({label for example in examples for label in self.get_labels(example)}))

    def label_to_id(self, label: str) -> int:
        """Return a label's number.

        Raises:
            DataError: there is no such label.
        """
        try:
            return self.labels.index(label)
        except ValueError:
            known = ", ".join(self.labels[:20])
            raise DataError(
                f"The label '{label}' was never seen in training, known are {known}."
                f"{closest_match(label, self.labels)}",
                "Correct it, or train with examples of it.",
            ) from None

    @abstractmethod
    def encode(self, example: Any, encodings: Sequence[Encoding], tokenizer: HFTokenizer) -> list[EncodedExample]:
        """Return an example's rows.

        Raises:
            DataError: it is longer than the model reads and no stride is given, or a label is unknown.
        """

    @abstractmethod
    def postprocess(
        self, example: Any, encodings: Sequence[Encoding], windows: Sequence[EncodedExample], logits: Sequence[Logits]
    ) -> dict[str, Any]:
        """Return what the model says of an example, as JSON can hold it.

        Args:
            example: with or without a label.
            encodings: of its texts.
            windows: its rows.
            logits: of each row, (num_labels,) or (length, num_labels), unnormalised.
        """

    def split_windows(self, num_tokens: int, num_reserved: int) -> list[tuple[int, int]]:
        """Return the windows (from, to) of a text in rows where ``num_reserved`` places are not for its tokens.

        Raises:
            DataError: it does not fit and no stride is given, or nothing would fit.
        """
        room = self.max_length - num_reserved
        if num_tokens <= room:
            return [(0, num_tokens)]
        if self.stride is None:
            raise DataError(
                f"The text has {num_tokens} tokens, {room} fit into what the model reads at once ({self.max_length}).",
                "Give --data.task.stride to cut it into overlapping windows, or a model with more positions and "
                "--data.task.max_length.",
            )
        if room < self.stride:
            raise DataError(
                f"Beside {num_reserved} other tokens {room} of the text fit into {self.max_length}, less than the "
                f"stride {self.stride}.",
                "Lower --data.task.stride, or raise --data.task.max_length.",
            )
        # The last window is as long as the others: what ends a text is read with what comes before it.
        begins = [*range(0, num_tokens - room, self.stride), num_tokens - room]
        return [(begin, begin + room) for begin in begins]

    def to_dict(self) -> dict[str, Any]:
        """Return what makes the task anew, as JSON can hold it."""
        return {"kind": self.kind, "labels": list(self.labels), "max_length": self.max_length, "stride": self.stride}


def build_inputs(
    tokenizer: HFTokenizer, first_ids: IntArray, second_ids: IntArray | None = None
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Return ids, types and global tokens of ``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]``.

    ``[CLS]`` is global.
    """
    parts = [np.array([tokenizer.cls_token_id]), first_ids, np.array([tokenizer.sep_token_id])]
    types = [np.zeros(len(first_ids) + 2, dtype=np.int64)]
    if second_ids is not None:
        parts += [second_ids, np.array([tokenizer.sep_token_id])]
        types.append(np.ones(len(second_ids) + 1, dtype=np.int64))
    ids = np.concatenate(parts).astype(np.int64)
    marked = np.zeros(len(ids), dtype=np.bool_)
    marked[0] = True
    return ids, np.concatenate(types), marked


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the softmax over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    powers = np.exp(shifted)
    out: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return out


NO_TARGET = np.array([IGNORE_INDEX], dtype=np.int64)
"""The target of an example without a label."""
