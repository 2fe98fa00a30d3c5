"""Base of tasks: examples encoded as token windows, and logits decoded as predictions.

Each task sets which tokens are global (Longformer, Beltagy et al. 2020, section 3.1).
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from memtx.data.batch import IGNORE_INDEX
from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.errors import DataError, closest_match

FORMAT, FORMAT_VERSION = "memtx.task", 2

IntArray = NDArray[np.int64]
Logits = NDArray[np.float32]

NO_TARGET = np.array([IGNORE_INDEX], dtype=np.int64)  # of an example without a label

_TASKS_BY_KIND: dict[str, type[Task]] = {}


CLS_TYPE = 2
"""Token type of ``[CLS]`` after the texts."""


@dataclass(eq=False)
class EncodedExample:
    """A window: an example, or a part of one that is longer than the model's input."""

    ids: IntArray  # (length,) tokens with special tokens
    token_type_ids: IntArray  # (length,) 0 for the first text and 1 for the second, CLS_TYPE for [CLS] if it is last
    global_attention_mask: NDArray[np.bool_]  # (length,) True for global tokens
    input_start: int  # index in the window of the first token of the part
    text_start: int  # index of that token in the text that may be split
    text_stop: int  # index in that text after the part's last token
    target: IntArray | None = None  # labels to learn; meaningless if the example has none
    part: int = 0  # text of the example that the window is of: a choice, or a query (0) and its documents

    @property
    def cls_position(self) -> int:
        """Index in the window of ``[CLS]``."""
        return len(self.ids) - 1 if self.token_type_ids[-1] == CLS_TYPE else 0


@dataclass(eq=False)
class PreparedExample:
    """An example, the encodings of its texts, and its windows."""

    example: Any
    encodings: Sequence[Encoding]
    windows: Sequence[EncodedExample]

    @property
    def ids(self) -> IntArray:
        """The tokens of the longest window."""
        return max((window.ids for window in self.windows), key=len)


class Task(ABC):
    """Base of all tasks. Raises DataError if a number is out of range, or labels repeat.

    Args:
        labels: Labels in order. None takes those of the training examples.
        max_length: Maximum tokens of a window, with special tokens.
        stride: Tokens from the start of one window to the next in a longer text. None rejects a longer text.
    """

    kind: ClassVar[str]  # name of the task in a checkpoint
    example_type: ClassVar[Any]  # class of the examples, of memtx.data.tasks.examples
    text_fields: ClassVar[tuple[str, ...]]  # attributes of an example that hold its texts
    keeps_windows_together: ClassVar[bool] = False  # if True, a batch has all windows of each of its examples

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            _TASKS_BY_KIND[cls.kind] = cls

    def __init__(self, labels: Sequence[str] | None = None, max_length: int = 512, stride: int | None = None) -> None:
        if max_length < 8:
            message = f"max_length is {max_length}, expected at least 8 tokens."
            raise DataError(message, "Change --data.task.max_length.")
        if stride is not None and not 1 <= stride < max_length:
            raise DataError(f"stride is {stride}, expected 1 to {max_length - 1}.", "Change --data.task.stride.")
        self.labels = tuple(labels or ())
        if len(set(self.labels)) < len(self.labels):
            raise DataError(f"labels repeat: {', '.join(self.labels)}.", "Name each once.")
        self.max_length, self.stride = max_length, stride

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> Any:
        """Return the example of a record; raises DataError."""
        return self.example_type.parse(record, labelled)

    @abstractmethod
    def from_text(self, text: str) -> Any:
        """Return a raw text as an example without a label; raises DataError if the task needs more than one text."""

    def get_texts(self, example: Any) -> tuple[str, ...]:
        """Return the texts to encode."""
        return tuple(getattr(example, name) for name in self.text_fields)

    def get_labels(self, example: Any) -> tuple[str, ...]:
        """Return the labels of an example; none by default."""
        return ()

    @property
    def num_labels(self) -> int:
        """Number of logits per example or per token."""
        return len(self.labels)

    def fit_labels(self, examples: Iterable[Any]) -> None:
        """Take the labels of examples, in alphabetical order, if there are none yet."""
        if not self.labels:
            self.labels = tuple(sorted({label for example in examples for label in self.get_labels(example)}))

    def label_to_id(self, label: str) -> int:
        """Return the index of a label; raises DataError if there is no such label."""
        if label not in self.labels:
            known = f"{', '.join(self.labels[:20])}.{closest_match(label, self.labels)}"
            message = f"The label '{label}' was never seen in training, known are {known}"
            raise DataError(message, "Correct it, or train with examples of it.")
        return self.labels.index(label)

    @abstractmethod
    def encode(self, example: Any, encodings: Sequence[Encoding], tokenizer: HFTokenizer) -> list[EncodedExample]:
        """Return the windows of an example; raises DataError for an unknown label, or a long text without a stride."""

    def prepare(self, example: Any, tokenizer: HFTokenizer) -> PreparedExample:
        """Encode the texts of an example, and its windows; raises as :meth:`encode`."""
        encodings = tokenizer.encode_with_offsets(self.get_texts(example))
        return PreparedExample(example, encodings, self.encode(example, encodings, tokenizer))

    def describe_losses(self, examples: Sequence[PreparedExample]) -> str | None:
        """Return a sentence on the parts of examples that are in no window, if there are any."""
        return None

    @abstractmethod
    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return the prediction for an example, with or without a label, as JSON values.

        ``logits`` holds those of each window, ``(num_labels,)`` or ``(length, num_labels)``.
        """

    def split_windows(self, num_tokens: int, num_reserved: int) -> list[tuple[int, int]]:
        """Return the first and last (exclusive) tokens of each window of a text.

        ``num_reserved`` tokens of a window are not of the text. Raises DataError if the text does not fit and there is
        no stride, or no token would fit.
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
        # The last window is as long as the others, so the end of a text has context before it.
        window_starts = [*range(0, num_tokens - room, self.stride), num_tokens - room]
        return [(start, start + room) for start in window_starts]

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        return {"kind": self.kind, "labels": list(self.labels), "max_length": self.max_length, "stride": self.stride}


def task_to_json(task: Task) -> str:
    """Return a task as JSON text."""
    return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **task.to_dict()}, ensure_ascii=False)


def task_from_json(text: str) -> Task:
    """Return the task that :func:`task_to_json` wrote; raises DataError for any other text, version or kind."""
    for name in ("classification", "dialogue", "multiple_choice", "question_answering", "retrieval", "tagging"):
        importlib.import_module(f"memtx.data.tasks.{name}")  # which registers its kinds
    try:
        value = json.loads(text)
        if value.pop("format") != FORMAT or value.pop("version") != FORMAT_VERSION:
            raise DataError("The task was written by another release.", "Use that release.")
        return _TASKS_BY_KIND[value.pop("kind")](**value)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"The text describes no task: {error}.", "Use one that memtx wrote.") from error


def build_inputs(
    tokenizer: HFTokenizer, first_ids: IntArray, second_ids: IntArray | None = None
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Return ids, token types and global mask of ``[CLS] first [SEP]`` (and ``second [SEP]``); ``[CLS]`` is global.

    The tokenizer decides on the number of separators between two texts, and whether ``[CLS]`` is last, of type 2.
    """
    sep, num_separators = np.array([tokenizer.sep_token_id]), 1
    second_parts: tuple[IntArray, ...] = ()
    if second_ids is not None:
        num_separators = tokenizer.num_pair_separators
        second_parts = (*[sep] * (num_separators - 1), second_ids, sep)
    cls, texts = np.array([tokenizer.cls_token_id]), np.concatenate([first_ids, sep, *second_parts])
    types = (np.arange(len(texts)) >= len(first_ids) + num_separators).astype(np.int64)
    position = len(texts) if tokenizer.has_cls_last else 0  # of [CLS]
    ids = np.insert(texts.astype(np.int64), position, cls)
    types = np.insert(types, position, CLS_TYPE if position else 0)
    return ids, types, np.arange(len(ids)) == position


def keep_newest(ids: IntArray, limit: int) -> IntArray:
    """Return the first token, which is special, and the last ``limit - 1``."""
    return np.concatenate([ids[:1], ids[len(ids) - limit + 1 :]])


def mean_by_part(prepared: PreparedExample, logits: Sequence[Logits]) -> list[Logits]:
    """Return the mean of the windows' logits for each part of an example, in order."""
    parts = np.array([window.part for window in prepared.windows])
    stacked = np.stack(logits)
    return [stacked[parts == part].mean(0) for part in range(int(parts.max()) + 1)]
