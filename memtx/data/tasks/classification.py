"""Classification of texts and of pairs of texts (entailment, paraphrase): one label an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import NO_TARGET, EncodedExample, IntArray, Logits, PreparedExample, Task, build_inputs
from memtx.data.tasks.examples import PairExample, TextExample
from memtx.errors import DataError


class _SingleLabelTask(Task):
    """Base of tasks with one label an example; the probabilities of the windows of a long example are averaged."""

    def get_labels(self, example: Any) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def _make_target(self, label: str | None) -> IntArray:
        return NO_TARGET if label is None else np.array([self.label_to_id(label)], dtype=np.int64)

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``label``, its probability ``score``, and the probabilities of all labels as ``scores``."""
        probabilities = torch.from_numpy(np.stack(logits)).double().softmax(-1).mean(0)
        scores = {label: round(score, 6) for label, score in zip(self.labels, probabilities.tolist(), strict=True)}
        best = self.labels[int(probabilities.argmax())]
        return {"label": best, "score": scores[best], "scores": scores}


class Classification(_SingleLabelTask):
    """``{"text", "label"}``: one label a text of any length. ``[CLS]`` is global."""

    kind = "classification"
    example_type = TextExample

    def from_text(self, text: str) -> TextExample:
        """Return a raw text as an example without a label."""
        return TextExample.parse({"text": text}, False)

    def get_texts(self, example: TextExample) -> tuple[str, ...]:
        """Return the text."""
        return (example.text,)

    def encode(
        self, example: TextExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] text [SEP]`` in one or more windows."""
        target = self._make_target(example.label)
        return [
            EncodedExample(*build_inputs(tokenizer, encodings[0].ids[start:stop]), 1, start, stop, target)
            for start, stop in self.split_windows(len(encodings[0]), 2)
        ]


class PairClassification(_SingleLabelTask):
    """``{"text_a", "text_b", "label"}``: the relation of two texts. ``[CLS]`` is global.

    In a pair that is too long the first text is split, if there is a stride.
    """

    kind = "matching"
    example_type = PairExample

    def from_text(self, text: str) -> PairExample:
        """Raise DataError: one text is no pair."""
        raise DataError("This model compares two texts.", 'Give {"text_a": ..., "text_b": ...} as JSON.')

    def get_texts(self, example: PairExample) -> tuple[str, ...]:
        """Return the two texts."""
        return (example.text_a, example.text_b)

    def encode(
        self, example: PairExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return ``[CLS] text_a [SEP] text_b [SEP]`` in one or more windows."""
        target = self._make_target(example.label)
        first, second = encodings
        return [
            EncodedExample(*build_inputs(tokenizer, first.ids[start:stop], second.ids), 1, start, stop, target)
            for start, stop in self.split_windows(len(first), len(second) + 3)
        ]
