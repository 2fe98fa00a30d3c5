"""What a decoder writes after a text, as training on texts and summaries taught it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Self

from memtx.data.examples import SummaryExample
from memtx.data.summary_form import SummaryForm
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.answering import Answering, Input
from memtx.inference.generate import generate
from memtx.inference.loading import load
from memtx.inference.predictor import Predictor, task_parts
from memtx.inference.sampling import Sampling
from memtx.models.memory_transformer import MemoryTransformer


class Summarizer(Answering):
    """Writes what follows texts of any length.

    Args:
        model: in eval mode, on any device.
        tokenizer: that it was trained with.
        form: how it is asked.
        longest: tokens of a summary at most.
    """

    kind = "summary"
    model: MemoryTransformer

    def __init__(
        self, model: MemoryTransformer, tokenizer: Tokenizer, form: SummaryForm, *, longest: int = 256
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.form, self.longest = model.eval(), tokenizer, form, longest

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what is kept in a checkpoint or a run's folder.

        Raises:
            CheckpointError: missing, damaged, or not trained on summaries.
        """
        kept = task_parts(path).get("summary")
        try:
            form = SummaryForm(**json.loads(str(kept)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' was not trained on summaries.", "Give a run on such examples.") from error
        return cls(*load(path), form)

    def example(self, given: Input) -> SummaryExample:
        """Return one input, a raw text or ``{"text": ...}``, as an example; raises DataError."""
        return SummaryExample.parse({"text": given} if isinstance(given, str) else given, False)

    def predict(self, inputs: Sequence[Input], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return ``summary`` of each input, and whether it is ``complete`` or was cut at the longest allowed."""
        texts = self._each(inputs, lambda given: self.example(given).text)
        with self._in_turn(deadline):
            return [self._said(text, deadline) for text in texts]

    def _said(self, text: str, deadline: float | None) -> dict[str, Any]:
        asked = self.form.question(text)
        self.tokens_read += len(self.tokenizer.encode(asked))
        pieces = []
        greedy = Sampling(greedy=True)
        made = generate(self.model, self.tokenizer, asked, max_tokens=self.longest, sampling=greedy)
        # Stopped here and not by the generator, to know whether the end came.
        for piece in made:
            self._go_on(deadline)
            pieces.append(piece)
            if self.form.end in "".join(pieces[-len(self.form.end) - 1 :]):
                break
        summary, end, _ = "".join(pieces).partition(self.form.end)
        return {"summary": summary, "complete": bool(end)}


def load_predictor(path: str | os.PathLike[str]) -> Predictor | Summarizer:
    """Return whichever answers for what is kept at ``path``; raises what their ``load`` raises."""
    return Summarizer.load(path) if "summary" in task_parts(path) else Predictor.load(path)
