"""Questions answered by a span of their context, or by no answer (SQuAD 2.0, Rajpurkar, Jia and Liang 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, IntArray, Logits, PreparedExample, Task, build_inputs
from memtx.data.tasks.examples import QuestionExample
from memtx.errors import DataError

START, END = 0, 1  # a token's two logits: the answer starts with it, the answer ends with it


class QuestionAnswering(Task):
    """``{"context", "question", "answers", "is_impossible"}``. ``[CLS]`` and the question are global.

    The target of a question without an answer, and of a window without the answer, is ``[CLS]`` (Devlin et al. 2019,
    section 4.3). Raises DataError if a number is out of range.

    Args:
        max_length: Maximum tokens of a window, with special tokens and the question.
        stride: Tokens from the start of one window to the next in a longer context. None rejects a longer one.
        max_answer_length: Maximum tokens of an answer.
        answer_threshold: Difference by which the best span's score must exceed that of ``[CLS]``.
    """

    kind = "questions"
    example_type = QuestionExample
    text_fields = ("question", "context")

    def __init__(
        self,
        max_length: int = 512,
        stride: int | None = None,
        max_answer_length: int = 30,
        answer_threshold: float = 0.0,
    ) -> None:
        super().__init__((), max_length, stride)
        if max_answer_length < 1:
            message = f"max_answer_length is {max_answer_length}, expected at least 1 token."
            raise DataError(message, "Change --data.task.max_answer_length.")
        self.max_answer_length, self.answer_threshold = max_answer_length, answer_threshold

    @property
    def num_labels(self) -> int:
        """Two logits a token."""
        return 2

    def from_text(self, text: str) -> QuestionExample:
        """Raise DataError: a text alone is no question."""
        message = "This model answers a question about a context."
        raise DataError(message, 'Give {"context": ..., "question": ...} as JSON.')

    def encode(
        self, example: QuestionExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] question [SEP] context [SEP]``, or ``context [SEP] question [SEP] [CLS]``.

        The target is the answer's first and last position.
        """
        question, context = encodings
        answer = _answer_token_range(example, context)
        num_others = len(question) + 1 + tokenizer.num_pair_separators + 1
        has_cls_last, windows = tokenizer.has_cls_last, []
        context_start = 0 if has_cls_last else num_others - 1
        for start, stop in self.split_windows(len(context), num_others):
            texts = [question.ids, context.ids[start:stop]]
            # XLNet's answers were trained with the context first.
            inputs = build_inputs(tokenizer, *(reversed(texts) if has_cls_last else texts))
            target = np.full(2, len(inputs[0]) - 1 if has_cls_last else 0, dtype=np.int64)
            if answer is not None and start <= answer[0] and answer[1] < stop:
                target[:] = context_start + np.array(answer) - start
            windows.append(EncodedExample(*inputs, context_start, start, stop, target))
            if not has_cls_last:
                windows[-1].global_attention_mask[: len(question) + 1] = True
        return windows

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``answer``, ``start`` and ``end`` in characters, ``score`` and ``is_impossible``.

        ``score`` is the probability that the best span beats no answer. If no answer wins, ``is_impossible`` is True
        and ``answer`` empty.
        """
        best_score, best_span, no_answer_score = -np.inf, (0, 0), np.inf
        for window, window_logits in zip(prepared.windows, logits, strict=True):
            cls_logits = window_logits[window.cls_position]
            no_answer_score = min(no_answer_score, float(cls_logits[START] + cls_logits[END]))
            context_stop = window.input_start + window.text_stop - window.text_start
            score, start, end = _best_span(window_logits[window.input_start : context_stop], self.max_answer_length)
            if score > best_score:
                best_score, best_span = score, (window.text_start + start, window.text_start + end)
        margin = best_score - no_answer_score
        example: QuestionExample = prepared.example
        prediction: dict[str, Any] = {"id": example.id} if example.id else {}
        probability = round(float(1 / (1 + np.exp(-np.clip(margin, -50, 50)))), 6)
        if margin <= self.answer_threshold:
            return prediction | {"answer": "", "start": None, "end": None, "score": probability, "is_impossible": True}
        offsets = prepared.encodings[1].offsets
        start, end = int(offsets[best_span[0], 0]), int(offsets[best_span[1], 1])
        answer = example.context[start:end]
        return prediction | {"answer": answer, "start": start, "end": end, "score": probability, "is_impossible": False}

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        names = ("kind", "max_length", "stride", "max_answer_length", "answer_threshold")
        return {name: getattr(self, name) for name in names}


def _answer_token_range(example: QuestionExample, context: Encoding) -> tuple[int, int] | None:
    """Return the first and the last token of the first answer, or None without an answer."""
    if not example.answers:
        return None
    answer = example.answers[0]
    first_characters: IntArray = context.offsets[:, 0]
    end_characters: IntArray = context.offsets[:, 1]
    indices = np.flatnonzero((end_characters > answer.start) & (first_characters < answer.start + len(answer.text)))
    return (int(indices[0]), int(indices[-1])) if len(indices) else None


def _best_span(logits: Logits, max_answer_length: int) -> tuple[float, int, int]:
    """Return the greatest sum of start and end logits in ``max_answer_length`` tokens, and its first and last token."""
    if not len(logits):
        return -np.inf, 0, 0
    sums = logits[:, START, None] + logits[None, :, END]
    indices = np.arange(len(logits))
    distances = indices[None, :] - indices[:, None]
    sums = np.where((distances >= 0) & (distances < max_answer_length), sums, -np.inf)
    start, end = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[start, end]), int(start), int(end)
