"""Classification of dialogues: the intent, topic or outcome after any number of turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memtx.data.hf_tokenizers import Encoding, HFTokenizer
from memtx.data.tasks.base import EncodedExample, Logits, PreparedExample, build_inputs
from memtx.data.tasks.classification import SingleLabelTask
from memtx.data.tasks.examples import DialogueExample
from memtx.data.tasks.turns import Turn
from memtx.errors import DataError


class DialogueClassification(SingleLabelTask):
    """``{"turns": [{"role", "content"}, ...], "label"}``, oldest turn first; ``messages`` is another name of ``turns``.

    A dialogue is read as ``[CLS] role: content [SEP] role: content [SEP] ...``; ``[CLS]`` is global.

    Args:
        labels: Labels in order. None takes those of the training examples.
        max_length: Maximum tokens of a window, with special tokens.
        stride: Tokens from the start of one window to the next in a longer dialogue, whose probabilities are averaged.
        drop_oldest: If True, a longer dialogue loses its oldest turns, and no stride may be given. If False, and
            without a stride, it is an error.
    """

    kind = "dialogue"
    example_type = DialogueExample

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        max_length: int = 512,
        stride: int | None = None,
        drop_oldest: bool = False,
    ) -> None:
        super().__init__(labels, max_length, stride)
        if drop_oldest and stride is not None:
            raise DataError("Both stride and drop_oldest are given.", "Remove one of them from --data.task.")
        self.drop_oldest = drop_oldest

    def from_text(self, text: str) -> DialogueExample:
        """Return a raw text as the only turn, of the role ``user``."""
        return DialogueExample((str(Turn("user", text)),))

    def get_texts(self, example: DialogueExample) -> tuple[str, ...]:
        """Return a text for each turn."""
        return example.turns

    def encode(
        self, example: DialogueExample, encodings: Sequence[Encoding], tokenizer: HFTokenizer
    ) -> list[EncodedExample]:
        """Return the dialogue in one or more windows, or its newest turns."""
        sep = np.array([tokenizer.sep_token_id])
        ids = np.concatenate([part for encoding in encodings for part in (encoding.ids, sep)])[:-1]
        if self.drop_oldest:
            spans = [(self._first_token(encodings, len(ids)), len(ids))]
        else:
            spans = self.split_windows(len(ids), 2)
        target, input_start = self.make_target(example), tokenizer.num_prefix_tokens
        return [
            EncodedExample(*build_inputs(tokenizer, ids[start:stop]), input_start, start, stop, target)
            for start, stop in spans
        ]

    def _first_token(self, encodings: Sequence[Encoding], num_tokens: int) -> int:
        """Return the first token of the newest turns that fit, or within the newest turn if it is longer."""
        earliest = max(0, num_tokens - (self.max_length - 2))
        turn_starts = _turn_starts(encodings)
        return next((start for start in turn_starts if start >= earliest), earliest)

    def describe_losses(self, examples: Sequence[PreparedExample]) -> str | None:
        """Return how many dialogues lost turns."""
        num_cut = sum(example.windows[0].text_start > 0 for example in examples)
        if not num_cut:
            return None
        return f"{num_cut} of {len(examples)} dialogues are longer than {self.max_length} tokens: without oldest turns."

    def postprocess(self, prepared: PreparedExample, logits: Sequence[Logits]) -> dict[str, Any]:
        """Return the prediction of a text, and the number of ``dropped_turns``, whole or in part, if there are any."""
        prediction = super().postprocess(prepared, logits)
        first_token = prepared.windows[0].text_start
        num_dropped = sum(start < first_token for start in _turn_starts(prepared.encodings))
        return prediction | {"dropped_turns": num_dropped} if num_dropped else prediction

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the constructor's arguments as JSON values."""
        return {**super().to_dict(), "drop_oldest": self.drop_oldest}


def _turn_starts(encodings: Sequence[Encoding]) -> list[int]:
    """Return the first token of each turn; a separator is between two turns."""
    lengths = [len(encoding) + 1 for encoding in encodings]
    return [sum(lengths[:index]) for index in range(len(lengths))]
