"""What a text is, and how two texts stand to each other (entailment, paraphrase): one label an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memtx.data.examples import PairExample, TextExample
from memtx.data.offset_tokenizers import Encoded, OffsetTokenizer
from memtx.data.task import NOTHING, Array, Scores, Task, Window, laid_out, normalised
from memtx.errors import DataError


class _Labelled(Task):
    """One label an example; windows of a long one vote with what they hold for likely."""

    def _target(self, label: str | None) -> Array:
        return NOTHING if label is None else np.array([self.number(label)], dtype=np.int64)

    def decide(
        self, example: Any, encoded: Sequence[Encoded], windows: Sequence[Window], scores: Sequence[Scores]
    ) -> dict[str, Any]:
        """Return ``label``, its probability ``score`` and those of all labels as ``scores``."""
        shares = normalised(np.stack(scores)).mean(0)
        best = int(shares.argmax())
        named = {label: round(float(share), 6) for label, share in zip(self.labels, shares, strict=True)}
        return {"label": self.labels[best], "score": named[self.labels[best]], "scores": named}


class Classification(_Labelled):
    """``{"text", "label"}``: one label a text, however long. ``[CLS]`` is global."""

    kind = "classification"

    def parse(self, record: Mapping[str, Any], labelled: bool = True) -> TextExample:
        """Return a record as an example; raises DataError."""
        return TextExample.parse(record, labelled)

    def from_text(self, text: str) -> TextExample:
        """Return a raw text as an example without a label."""
        return TextExample.parse({"text": text}, False)

    def texts(self, example: TextExample) -> tuple[str, ...]:
        """Return the text."""
        return (example.text,)

    def named(self, example: TextExample) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def windows(self, example: TextExample, encoded: Sequence[Encoded], marks: OffsetTokenizer) -> list[Window]:
        """Return ``[CLS] text [SEP]``, in as many windows as it takes."""
        target = self._target(example.label)
        return [
            Window(*laid_out(marks, encoded[0].ids[begin:stop]), 1, begin, stop, target)
            for begin, stop in self.cut(len(encoded[0]), 2)
        ]


class Matching(_Labelled):
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

    def texts(self, example: PairExample) -> tuple[str, ...]:
        """Return both texts."""
        return (example.text_a, example.text_b)

    def named(self, example: PairExample) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def windows(self, example: PairExample, encoded: Sequence[Encoded], marks: OffsetTokenizer) -> list[Window]:
        """Return ``[CLS] text_a [SEP] text_b [SEP]``."""
        target = self._target(example.label)
        first, second = encoded
        return [
            Window(*laid_out(marks, first.ids[begin:stop], second.ids), 1, begin, stop, target)
            for begin, stop in self.cut(len(first), len(second) + 3)
        ]
