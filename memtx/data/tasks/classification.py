"""Classification of texts and of pairs of texts (entailment, paraphrase): one label an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import NO_TARGET, EncodedExample, IntArray, Logits, PreparedExample, Task, build_inputs
from memtx.data.tasks.examples import MultiLabelExample, PairExample, TextExample
from memtx.errors import DataError

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


class SingleLabelTask(Task):
    """Base of tasks with one label an example; the probabilities of the windows of a long example are averaged."""

    def get_labels(self, example: Any) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def make_target(self, example: Any) -> IntArray:
        """Return the label's index; raises DataError if it is unknown."""
        return NO_TARGET if example.label is None else np.array([self.label_to_id(example.label)], dtype=np.int64)

    def encode(self, example: Any, encodings: Sequence[Encoding], tokenizer: HFTokenizer) -> list[EncodedExample]:
        """Return ``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]`` in one or more windows."""
        first, *others = encodings
        second_ids = others[0].ids if others else None
        num_reserved = 2 + sum(len(encoding) + tokenizer.num_pair_separators for encoding in others)
        target = self.make_target(example)
        num_prefix = tokenizer.num_prefix_tokens
        return [
            EncodedExample(*build_inputs(tokenizer, first.ids[start:stop], second_ids), num_prefix, start, stop, target)
            for start, stop in self.split_windows(len(first), num_reserved)
        ]

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``label``, its probability ``score``, and the probabilities of all labels as ``scores``."""
        probabilities = torch.from_numpy(np.stack(logits)).double().softmax(-1).mean(0)
        scores = {label: round(score, 6) for label, score in zip(self.labels, probabilities.tolist(), strict=True)}
        best = self.labels[int(probabilities.argmax())]
        return {"label": best, "score": scores[best], "scores": scores}


class Classification(SingleLabelTask):
    """``{"text", "label"}``: one label a text of any length. ``[CLS]`` is global."""

    kind = "classification"
    example_type: ClassVar[Any] = TextExample
    text_fields = ("text",)

    def from_text(self, text: str) -> TextExample:
        """Return a raw text as an example without a label."""
        return TextExample.parse({"text": text}, False)


class MultiLabelClassification(Classification):
    """``{"text", "labels"}``: any number of labels a text. ``[CLS]`` is global.

    Args:
        labels: Labels in order. None takes those of the training examples.
        max_length, stride: As in :class:`~memtx.data.tasks.base.Task`.
        threshold: Probability from which a label is predicted.
    """

    kind = "multi_label"
    example_type = MultiLabelExample

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        max_length: int = 512,
        stride: int | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(labels, max_length, stride)
        if not 0.0 < threshold < 1.0:
            raise DataError(f"threshold is {threshold}, expected a number between 0 and 1.", "0.5 is common.")
        self.threshold = threshold

    def from_text(self, text: str) -> Any:
        """Return a raw text as an example without labels."""
        return self.parse({"text": text}, False)

    def get_labels(self, example: MultiLabelExample) -> tuple[str, ...]:
        """Return the labels, if there are any."""
        return example.labels or ()

    def make_target(self, example: MultiLabelExample) -> IntArray:
        """Return 1 for each label of the example and 0 for the others; raises DataError if one is unknown."""
        if example.labels is None:
            return NO_TARGET
        target = np.zeros(len(self.labels), dtype=np.int64)
        target[[self.label_to_id(label) for label in example.labels]] = 1
        return target

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``labels``, those whose probability reaches the threshold, and all probabilities as ``scores``."""
        probabilities = torch.from_numpy(np.stack(logits)).double().sigmoid().mean(0)
        scores = {label: round(score, 6) for label, score in zip(self.labels, probabilities.tolist(), strict=True)}
        return {"labels": [label for label, score in scores.items() if score >= self.threshold], "scores": scores}

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        return {**super().to_dict(), "threshold": self.threshold}


class TextClassification(Classification):
    """``{"text"}``, or a pair ``{"text", "text_pair"}`` or ``{"text_a", "text_b"}``, for published models.

    Args:
        labels: Labels in order.
        max_length, stride: As in :class:`~memtx.data.tasks.base.Task`.
        problem_type: ``single_label_classification``, ``multi_label_classification`` or ``regression``. Defaults to
            regression for one label, otherwise to a single label.
    """

    kind = "text_classification"

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        max_length: int = 512,
        stride: int | None = None,
        problem_type: str | None = None,
    ) -> None:
        super().__init__(labels, max_length, stride)
        self.problem_type = problem_type or (REGRESSION if len(self.labels) == 1 else SINGLE_LABEL)
        if self.problem_type not in (SINGLE_LABEL, MULTI_LABEL, REGRESSION):
            message = f"problem_type is '{problem_type}', expected {SINGLE_LABEL}, {MULTI_LABEL} or {REGRESSION}."
            raise DataError(message, "Restore config.json.")

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> TextExample | PairExample:
        """Return the example of a record; raises DataError."""
        if "text_pair" in record:
            record = {**record, "text_a": record.get("text"), "text_b": record["text_pair"]}
        return (PairExample if "text_a" in record else TextExample).parse(record, labelled)

    def get_texts(self, example: TextExample | PairExample) -> tuple[str, ...]:
        """Return the text, or both."""
        return (example.text,) if isinstance(example, TextExample) else (example.text_a, example.text_b)

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``label``, ``score`` and ``scores``, or what the problem type has.

        Several labels give ``labels``, those with a probability of at least 0.5, and ``scores``; a regression gives its
        values as ``score`` or ``scores``.
        """
        if self.problem_type == SINGLE_LABEL:
            return super().postprocess(prepared, logits)
        values = torch.from_numpy(np.stack(logits)).double()
        values = (values.sigmoid() if self.problem_type == MULTI_LABEL else values).mean(0)
        scores = {label: round(value, 6) for label, value in zip(self.labels, values.tolist(), strict=True)}
        if self.problem_type == MULTI_LABEL:
            return {"labels": [label for label, score in scores.items() if score >= 0.5], "scores": scores}
        return {"score": next(iter(scores.values()))} if len(scores) == 1 else {"scores": scores}

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        return {**super().to_dict(), "problem_type": self.problem_type}


class PairClassification(SingleLabelTask):
    """``{"text_a", "text_b", "label"}``: the relation of two texts. ``[CLS]`` is global.

    In a pair that is too long the first text is split, if there is a stride.
    """

    kind = "matching"
    example_type = PairExample
    text_fields = ("text_a", "text_b")

    def from_text(self, text: str) -> PairExample:
        """Raise DataError: one text is no pair."""
        raise DataError("This model compares two texts.", 'Give {"text_a": ..., "text_b": ...} as JSON.')
