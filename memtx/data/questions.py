"""Questions answered by a span of their context, or by nothing in it (SQuAD 2.0, Rajpurkar, Jia and Liang 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.examples import QuestionExample
from memtx.data.offset_tokenizers import Encoded, OffsetTokenizer
from memtx.data.task import Array, Scores, Task, Window, laid_out
from memtx.errors import DataError

START, STOP = 0, 1
"""What a token's two scores mean: that the answer begins with it, that it ends with it."""


class Questions(Task):
    """``{"context", "question", "answers", "is_impossible"}``. ``[CLS]`` and the question are global.

    A question without an answer points at ``[CLS]`` (Devlin et al. 2019, section 4.3), and so does a window that does
    not hold the answer.

    Args:
        longest: tokens that the model reads at once, marks and question among them.
        stride: tokens from the beginning of one window of a context to the next; None to refuse a longer one.
        answer: tokens of an answer at most.
        threshold: by how much the best span must score above ``[CLS]`` to be given.
    """

    kind = "questions"

    def __init__(self, longest: int = 512, stride: int | None = None, answer: int = 30, threshold: float = 0.0) -> None:
        super().__init__((), longest, stride)
        if answer < 1:
            raise DataError(f"answer is {answer}, expected at least 1 token.", "Change --data.task.answer.")
        self.answer, self.threshold = answer, threshold

    @property
    def outputs(self) -> int:
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

    def texts(self, example: QuestionExample) -> tuple[str, ...]:
        """Return question and context."""
        return (example.question, example.context)

    def named(self, example: QuestionExample) -> tuple[str, ...]:
        """Return nothing: there are no labels."""
        return ()

    def windows(self, example: QuestionExample, encoded: Sequence[Encoded], marks: OffsetTokenizer) -> list[Window]:
        """Return ``[CLS] question [SEP] context [SEP]``; the target is the answer's first and last place."""
        question, context = encoded
        found = _tokens_of(example, context)
        made = []
        for begin, stop in self.cut(len(context), len(question) + 3):
            ids, types, marked = laid_out(marks, question.ids, context.ids[begin:stop])
            marked[: len(question) + 2] = True
            first = len(question) + 2
            target = np.zeros(2, dtype=np.int64)
            if found is not None and begin <= found[0] and found[1] < stop:
                target[:] = [first + found[0] - begin, first + found[1] - begin]
            made.append(Window(ids, types, marked, first, begin, stop, target))
        return made

    def decide(
        self, example: QuestionExample, encoded: Sequence[Encoded], windows: Sequence[Window], scores: Sequence[Scores]
    ) -> dict[str, Any]:
        """Return ``answer`` (empty if there is none), ``start`` and ``end`` in characters, ``score``, and more.

        ``score`` is the probability that the best span beats having no answer; ``is_impossible`` says which won.
        """
        best, place, nothing = -np.inf, (0, 0), np.inf
        for window, given in zip(windows, scores, strict=True):
            nothing = min(nothing, float(given[0, START] + given[0, STOP]))
            part = given[window.first : window.first + window.stop - window.begin]
            value, start, stop = _best(part, self.answer)
            if value > best:
                best, place = value, (window.begin + start, window.begin + stop)
        gain = best - nothing
        said: dict[str, Any] = {"id": example.id} if example.id else {}
        share = round(float(1 / (1 + np.exp(-np.clip(gain, -50, 50)))), 6)
        if gain <= self.threshold:
            return said | {"answer": "", "start": None, "end": None, "score": share, "is_impossible": True}
        start, stop = int(encoded[1].offsets[place[0], 0]), int(encoded[1].offsets[place[1], 1])
        text = example.context[start:stop]
        return said | {"answer": text, "start": start, "end": stop, "score": share, "is_impossible": False}

    def description(self) -> dict[str, Any]:
        """Return what makes the task anew, as JSON can hold it."""
        return {
            "kind": self.kind,
            "longest": self.longest,
            "stride": self.stride,
            "answer": self.answer,
            "threshold": self.threshold,
        }


def _tokens_of(example: QuestionExample, context: Encoded) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer; None where there is none."""
    if not example.answers:
        return None
    answer = example.answers[0]
    starts: Array = context.offsets[:, 0]
    stops: Array = context.offsets[:, 1]
    touched = np.flatnonzero((stops > answer.start) & (starts < answer.start + len(answer.text)))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _best(scores: Scores, longest: int) -> tuple[float, int, int]:
    """Return the greatest sum of a start's and a later stop's score within ``longest`` tokens, and both places."""
    if not len(scores):
        return -np.inf, 0, 0
    sums = scores[:, START, None] + scores[None, :, STOP]
    place = np.arange(len(scores))
    apart = place[None, :] - place[:, None]
    sums = np.where((apart >= 0) & (apart < longest), sums, -np.inf)
    start, stop = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[start, stop]), int(start), int(stop)
