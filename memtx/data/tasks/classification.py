"""What a text is, and how two texts stand to each other (entailment, paraphrase): one label an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import NO_TARGET, EncodedExample, IntArray, Logits, Task, build_inputs, softmax
from memtx.data.tasks.examples import PairExample, TextExample
from memtx.errors import DataError


class _SingleLabelTask(Task):
    """One label an example; windows of a long one vote with what they hold for likely."""

    def _make_target(self, label: str | None) -> IntArray:
        return NO_TARGET if label is None else np.array([self.label_to_id(label)], dtype=np.int64)

    def postprocess(
        self, example: Any, encodings: Sequence[Encoding], windows: Sequence[EncodedExample], logits: Sequence[Logits]
    ) -> dict[str, Any]:
        """Return ``label``, its probability ``score`` and those of all labels as ``scores``."""
        shares = softmax(np.stack(logits)).mean(0)
        best = int(shares.argmax())
        named = {label: round(float(share), 6) for label, share in zip(self.labels, shares, strict=True)}
        return {"label": self.labels[best], "score": named[self.labels[best]], "scores": named}


class Classification(_SingleLabelTask):
    """``{"text", "label"}``: one label a text, however long. ``[CLS]`` is global."""

    kind = "classification"

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> TextExample:
        """Return a record as an example; raises DataError."""
        return TextExample.parse(record, labelled)

    def from_text(self, text: str) -> TextExample:
        """Return a raw text as an example without a label."""
        return TextExample.parse({"text": text}, False)

    def get_texts(self, example: TextExample) -> tuple[str, ...]:
        """Return the text."""
        return (example.text,)

    def get_labels(self, example: TextExample) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def encode(
        self, example: TextExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] text [SEP]``, in as many windows as it takes."""
        target = self._make_target(example.label)
        return [
            EncodedExample(*build_inputs(tokenizer, encodings[0].ids[begin:stop]), 1, begin, stop, target)
            for begin, stop in self.split_windows(len(encodings[0]), 2)
        ]


class PairClassification(_SingleLabelTask):
    """``{"text_a", "text_b", "label"}``: how two texts stand to each other. ``[CLS]`` is global.

    Of a pair that is too long the first text is cut, where a stride is given.
    """

    kind = "matching"

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> PairExample:
        """Return a record as an example; raises DataError."""
        return PairExample.parse(record, labelled)

    def from_text(self, text: str) -> PairExample:
        """Refuse: one text is no pair."""
        raise DataError("This model compares two texts.", 'Give {"text_a": ..., "text_b": ...} as JSON.')

    def get_texts(self, example: PairExample) -> tuple[str, ...]:
        """Return both texts."""
        return (example.text_a, example.text_b)

    def get_labels(self, example: PairExample) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def encode(
        self, example: PairExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] text_a [SEP] text_b [SEP]``."""
        target = self._make_target(example.label)
        first, second = encodings
        return [
            EncodedExample(*build_inputs(tokenizer, first.ids[begin:stop], second.ids), 1, begin, stop, target)
            for begin, stop in self.split_windows(len(first), len(second) + 3)
        ]
