"""Questions answered by a span of their context, or by nothing in it (SQuAD 2.0, Rajpurkar, Jia and Liang 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, IntArray, Logits, Task, build_inputs
from memtx.data.tasks.examples import QuestionExample
from memtx.errors import DataError

START, END = 0, 1
"""What a token's two scores mean: that the answer begins with it, that it ends with it."""


class QuestionAnswering(Task):
    """``{"context", "question", "answers", "is_impossible"}``. ``[CLS]`` and the question are global.

    A question without an answer points at ``[CLS]`` (Devlin et al. 2019, section 4.3), and so does a window that does
    not hold the answer.

    Args:
        max_length: tokens that the model reads at once, marks and question among them.
        stride: tokens from the beginning of one window of a context to the next; None to refuse a longer one.
        max_answer_length: tokens of an answer at most.
        answer_threshold: by how much the best span must score above ``[CLS]`` to be given.
    """

    kind = "questions"

    def __init__(
        self,
        max_length: int = 512,
        stride: int | None = None,
        max_answer_length: int = 30,
        answer_threshold: float = 0.0,
    ) -> None:
        super().__init__((), max_length, stride)
        if max_answer_length < 1:
            raise DataError(
                f"max_answer_length is {max_answer_length}, expected at least 1 token.",
                "Change --data.task.max_answer_length.",
            )
        self.max_answer_length, self.answer_threshold = max_answer_length, answer_threshold

    @property
    def num_labels(self) -> int:
        """Two scores a token."""
        return 2

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> QuestionExample:
        """Return a record as an example; raises DataError."""
        return QuestionExample.parse(record, labelled)

    def from_text(self, text: str) -> QuestionExample:
        """Refuse: a text alone asks nothing."""
        raise DataError(
            "This model answers a question about a context.", 'Give {"context": ..., "question": ...} as JSON.'
        )

    def get_texts(self, example: QuestionExample) -> tuple[str, ...]:
        """Return question and context."""
        return (example.question, example.context)

    def get_labels(self, example: QuestionExample) -> tuple[str, ...]:
        """Return nothing: there are no labels."""
        return ()

    def encode(
        self, example: QuestionExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] question [SEP] context [SEP]``; the target is the answer's first and last place."""
        question, context = encodings
        found = _answer_token_range(example, context)
        made = []
        for begin, stop in self.split_windows(len(context), len(question) + 3):
            ids, types, marked = build_inputs(tokenizer, question.ids, context.ids[begin:stop])
            marked[: len(question) + 2] = True
            first = len(question) + 2
            target = np.zeros(2, dtype=np.int64)
            if found is not None and begin <= found[0] and found[1] < stop:
                target[:] = [first + found[0] - begin, first + found[1] - begin]
            made.append(EncodedExample(ids, types, marked, first, begin, stop, target))
        return made

    def postprocess(
        self,
        example: QuestionExample,
        encodings: Sequence[Encoding],
        windows: Sequence[EncodedExample],
        logits: Sequence[Logits],
    ) -> dict[str, Any]:
        """Return ``answer`` (empty if there is none), ``start`` and ``end`` in characters, ``score``, and more.

        ``score`` is the probability that the best span beats having no answer; ``is_impossible`` says which won.
        """
        best, place, nothing = -np.inf, (0, 0), np.inf
        for window, given in zip(windows, logits, strict=True):
            nothing = min(nothing, float(given[0, START] + given[0, END]))
            part = given[window.input_start : window.input_start + window.text_stop - window.text_start]
            value, start, stop = _best_span(part, self.max_answer_length)
            if value > best:
                best, place = value, (window.text_start + start, window.text_start + stop)
        gain = best - nothing
        said: dict[str, Any] = {"id": example.id} if example.id else {}
        share = round(float(1 / (1 + np.exp(-np.clip(gain, -50, 50)))), 6)
        if gain <= self.answer_threshold:
            return said | {"answer": "", "start": None, "end": None, "score": share, "is_impossible": True}
        start, stop = int(encodings[1].offsets[place[0], 0]), int(encodings[1].offsets[place[1], 1])
        text = example.context[start:stop]
        return said | {"answer": text, "start": start, "end": stop, "score": share, "is_impossible": False}

    def to_dict(self) -> dict[str, Any]:
        """Return what makes the task anew, as JSON can hold it."""
        return {
            "kind": self.kind,
            "max_length": self.max_length,
            "stride": self.stride,
            "max_answer_length": self.max_answer_length,
            "answer_threshold": self.answer_threshold,
        }


def _answer_token_range(example: QuestionExample, context: Encoding) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer; None where there is none."""
    if not example.answers:
        return None
    answer = example.answers[0]
    starts: IntArray = context.offsets[:, 0]
    stops: IntArray = context.offsets[:, 1]
    touched = np.flatnonzero((stops > answer.start) & (starts < answer.start + len(answer.text)))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _best_span(logits: Logits, max_answer_length: int) -> tuple[float, int, int]:
    """Return the greatest sum of a start's and a later stop's score within ``max_answer_length`` tokens, and both."""
    if not len(logits):
        return -np.inf, 0, 0
    sums = logits[:, START, None] + logits[None, :, END]
    place = np.arange(len(logits))
    apart = place[None, :] - place[:, None]
    sums = np.where((apart >= 0) & (apart < max_answer_length), sums, -np.inf)
    start, stop = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[start, stop]), int(start), int(stop)
