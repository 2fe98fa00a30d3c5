"""Classification of texts and of pairs of texts (entailment, paraphrase): one label an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import NO_TARGET, EncodedExample, Logits, PreparedExample, Task, build_inputs
from memtx.data.tasks.examples import PairExample, TextExample
from memtx.errors import DataError


class _SingleLabelTask(Task):
    """Base of tasks with one label an example; the probabilities of the windows of a long example are averaged."""

    def get_labels(self, example: Any) -> tuple[str, ...]:
        """Return the label, if there is one."""
        return () if example.label is None else (example.label,)

    def encode(self, example: Any, encodings: Sequence[Encoding], tokenizer: HFTokenizer) -> list[EncodedExample]:
        """Return ``[CLS] first [SEP]`` or ``[CLS] first [SEP] second [SEP]`` in one or more windows."""
        first, *others = encodings
        second_ids = others[0].ids if others else None
        num_reserved = 2 + sum(len(encoding) + 1 for encoding in others)
        target = NO_TARGET if example.label is None else np.array([self.label_to_id(example.label)], dtype=np.int64)
        return [
            EncodedExample(*build_inputs(tokenizer, first.ids[start:stop], second_ids), 1, start, stop, target)
            for start, stop in self.split_windows(len(first), num_reserved)
        ]

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
    text_fields = ("text",)

    def from_text(self, text: str) -> TextExample:
        """Return a raw text as an example without a label."""
        return TextExample.parse({"text": text}, False)


class PairClassification(_SingleLabelTask):
    """``{"text_a", "text_b", "label"}``: the relation of two texts. ``[CLS]`` is global.

    In a pair that is too long the first text is split, if there is a stride.
    """

    kind = "matching"
    example_type = PairExample
    text_fields = ("text_a", "text_b")

    def from_text(self, text: str) -> PairExample:
        """Raise DataError: one text is no pair."""
        raise DataError("This model compares two texts.", 'Give {"text_a": ..., "text_b": ...} as JSON.')
