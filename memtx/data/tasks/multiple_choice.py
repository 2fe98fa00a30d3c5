"""Multiple choice: the right one of several answers to a text (SWAG, RACE, COPA; Devlin et al. 2019, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import NO_TARGET, EncodedExample, Logits, PreparedExample, Task, build_inputs, mean_by_part
from memtx.data.tasks.record_fields import get_text, get_texts, missing_field, preview
from memtx.errors import DataError


@dataclass(frozen=True)
class ChoiceExample:
    """A text, an optional question about it, and answers; ``label`` is None if it is to be predicted."""

    text: str
    choices: tuple[str, ...]
    label: int | None = None  # index of the right choice
    question: str = ""

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        text, choices = get_text(record, "text"), get_texts(record, "choices")
        if len(choices) < 2:
            raise DataError(f"'choices' has {len(choices)} entries.", "Give at least two.")
        question = get_text(record, "question") if record.get("question") else ""
        label = record.get("label")
        if label is None:
            if labelled:
                raise missing_field(record, "label")
            return cls(text, choices, None, question)
        if isinstance(label, str) and choices.count(label) == 1:
            label = choices.index(label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
            message = f"'label' is {preview(label)}, expected a choice or its index, 0 to {len(choices) - 1}."
            raise DataError(message, "Correct it.")
        return cls(text, choices, label, question)


class MultipleChoice(Task):
    """``{"text", "question", "choices", "label"}``: the index, or the text, of the right choice.

    Each choice is read with the text, as ``[CLS] text [SEP] question choice [SEP]``; the question is optional, and
    examples may have different numbers of choices. A text that is too long is split, if there is a stride, and the
    logits of a choice's windows are averaged. ``[CLS]``, question and choice are global.
    """

    kind = "multiple_choice"
    example_type = ChoiceExample
    keeps_windows_together = True

    def __init__(self, max_length: int = 512, stride: int | None = None) -> None:
        super().__init__((), max_length, stride)

    @property
    def num_labels(self) -> int:
        """One logit a choice."""
        return 1

    def from_text(self, text: str) -> ChoiceExample:
        """Raise DataError: a text alone has no choices."""
        raise DataError("This model chooses from answers.", 'Give {"text": ..., "choices": [...]} as JSON.')

    def get_texts(self, example: ChoiceExample) -> tuple[str, ...]:
        """Return the text, and each choice after the question."""
        prefix = f"{example.question} " if example.question else ""
        return (example.text, *(prefix + choice for choice in example.choices))

    def encode(
        self, example: ChoiceExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return one or more windows a choice; the target is 1 for the right one, else 0."""
        text, *choices = encodings
        windows, input_start = [], tokenizer.num_prefix_tokens
        for index, choice in enumerate(choices):
            target = NO_TARGET if example.label is None else np.array([example.label == index], dtype=np.int64)
            num_separators = tokenizer.num_pair_separators
            for start, stop in self.split_windows(len(text), 2 + len(choice) + num_separators):
                ids, types, is_global = build_inputs(tokenizer, text.ids[start:stop], choice.ids)
                is_global |= types.astype(bool)
                windows.append(EncodedExample(ids, types, is_global, input_start, start, stop, target, part=index))
        return windows

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return ``choice``, its index ``label``, its probability ``score``, and the ``scores`` of all choices."""
        example: ChoiceExample = prepared.example
        values = np.array([float(value[0]) for value in mean_by_part(prepared, logits)])
        probabilities = np.exp(values - values.max())
        scores = [round(float(value), 6) for value in probabilities / probabilities.sum()]
        best = int(values.argmax())
        return {"choice": example.choices[best], "label": best, "score": scores[best], "scores": scores}

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        return {"kind": self.kind, "max_length": self.max_length, "stride": self.stride}
