"""What a decoder writes after a text, as training on texts and summaries taught it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Self

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tasks.examples import SummaryExample
from memtx.data.tasks.summary_prompt import SummaryPrompt
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.base_predictor import BasePredictor, PredictInput
from memtx.inference.generate import generate
from memtx.inference.predictor import Predictor, read_task_metadata
from memtx.inference.sampling import SamplingParams
from memtx.models.memory_transformer import MemoryTransformer


class Summarizer(BasePredictor):
    """Writes what follows texts of any length.

    Args:
        model: in eval mode, on any device.
        tokenizer: that it was trained with.
        summary_prompt: how it is asked.
        max_tokens: tokens of a summary at most.
    """

    task_name = "summary"
    model: MemoryTransformer

    def __init__(
        self, model: MemoryTransformer, tokenizer: Tokenizer, summary_prompt: SummaryPrompt, *, max_tokens: int = 256
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.summary_prompt, self.max_tokens = (
            model.eval(),
            tokenizer,
            summary_prompt,
            max_tokens,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what is kept in a checkpoint or a run's folder.

        Raises:
            CheckpointError: missing, damaged, or not trained on summaries.
        """
        kept = read_task_metadata(path).get("summary")
        try:
            form = SummaryPrompt(**json.loads(str(kept)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' was not trained on summaries.", "Give a run on such examples.") from error
        return cls(*load_model_and_tokenizer(path), form)

    def to_example(self, raw_input: PredictInput) -> SummaryExample:
        """Return one input, a raw text or ``{"text": ...}``, as an example; raises DataError."""
        return SummaryExample.parse({"text": raw_input} if isinstance(raw_input, str) else raw_input, False)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return ``summary`` of each input, and whether it is ``complete`` or was cut at the longest allowed."""
        texts = self._map_inputs(inputs, lambda given: self.to_example(given).text)
        with self._exclusive(deadline):
            return [self._summarize(text, deadline) for text in texts]

    def _summarize(self, text: str, deadline: float | None) -> dict[str, Any]:
        asked = self.summary_prompt.format_prompt(text)
        self.num_tokens_read += len(self.tokenizer.encode(asked))
        pieces = []
        greedy = SamplingParams(greedy=True)
        made = generate(self.model, self.tokenizer, asked, max_tokens=self.max_tokens, sampling_params=greedy)
        # Stopped here and not by the generator, to know whether the end came.
        for piece in made:
            self._check_active(deadline)
            pieces.append(piece)
            if self.summary_prompt.stop_sequence in "".join(pieces[-len(self.summary_prompt.stop_sequence) - 1 :]):
                break
        summary, end, _ = "".join(pieces).partition(self.summary_prompt.stop_sequence)
        return {"summary": summary, "complete": bool(end)}


def load_predictor(path: str | os.PathLike[str]) -> Predictor | Summarizer:
    """Return whichever answers for what is kept at ``path``; raises what their ``load`` raises."""
    return Summarizer.load(path) if "summary" in read_task_metadata(path) else Predictor.load(path)
