"""What a decoder writes after a text, as training on texts and summaries taught it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

from memtx.data.examples import SummaryExample
from memtx.data.summary_form import SummaryForm
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError
from memtx.inference.engine import ClosedError, OutOfTimeError, seconds_left
from memtx.inference.generate import generate
from memtx.inference.loading import load
from memtx.inference.predictor import Predictor, task_parts
from memtx.inference.sampling import Sampling
from memtx.models.memory_transformer import MemoryTransformer


class Summarizer:
    """Asked as a :class:`memtx.inference.predictor.Predictor` is; texts may be of any length.

    Args:
        model: in eval mode, on any device.
        tokenizer: that it was trained with.
        form: how it is asked.
        longest: tokens of a summary at most.
    """

    kind = "summary"

    def __init__(
        self, model: MemoryTransformer, tokenizer: Tokenizer, form: SummaryForm, *, longest: int = 256
    ) -> None:
        self.model, self.tokenizer, self.form, self.longest = model.eval(), tokenizer, form, longest
        self.tokens_read = 0
        self._turn = threading.Lock()
        self._closed = False

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

    def close(self) -> None:
        """Answer no more."""
        self._closed = True

    def example(self, given: str | Mapping[str, Any]) -> SummaryExample:
        """Return one input, a raw text or ``{"text": ...}``, as an example; raises DataError."""
        return SummaryExample.parse({"text": given} if isinstance(given, str) else given, False)

    def predict(
        self, inputs: Sequence[str | Mapping[str, Any]], *, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        """Return ``summary`` of each input, and whether it is ``complete`` or was cut at the longest allowed.

        Args:
            inputs: raw texts or fields of examples.
            deadline: a time of ``time.monotonic`` by which to be done; None for none.

        Raises:
            DataError: an input is no text; names its place.
            OutOfTimeError: the deadline passed.
            ClosedError: it was closed.
        """
        texts = []
        for place, given in enumerate(inputs):
            try:
                texts.append(self.example(given).text)
            except DataError as error:
                where = f"Input {place}: " if len(inputs) > 1 else ""
                raise DataError(f"{where}{error.what}", error.cure) from error
        left = seconds_left(deadline)
        if not self._turn.acquire(timeout=-1 if left is None else left):
            raise OutOfTimeError("The request took longer than it may.", "Ask for less at once.")
        try:
            return [self._said(text, deadline) for text in texts]
        finally:
            self._turn.release()

    def _said(self, text: str, deadline: float | None) -> dict[str, Any]:
        asked = self.form.question(text)
        self.tokens_read += len(self.tokenizer.encode(asked))
        pieces = []
        greedy = Sampling(greedy=True)
        made = generate(self.model, self.tokenizer, asked, max_tokens=self.longest, sampling=greedy)
        # Stopped here and not by the generator, to know whether the end came.
        for piece in made:
            seconds_left(deadline)
            if self._closed:
                raise ClosedError("The server is closing.", "Ask again when it is back.")
            pieces.append(piece)
            if self.form.end in "".join(pieces[-len(self.form.end) - 1 :]):
                break
        summary, end, _ = "".join(pieces).partition(self.form.end)
        return {"summary": summary, "complete": bool(end)}


def load_predictor(path: str | os.PathLike[str]) -> Predictor | Summarizer:
    """Return whichever answers for what is kept at ``path``; raises what their ``load`` raises."""
    return Summarizer.load(path) if "summary" in task_parts(path) else Predictor.load(path)
