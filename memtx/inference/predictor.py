"""Predictors: turn raw texts or examples into labels, tags, answers or summaries."""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import nn

from memtx import files
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import load, load_model_and_tokenizer
from memtx.data.hf_tokenizers import HFTokenizer, hf_tokenizer_from_json
from memtx.data.tasks.base import EncodedExample, Logits, PreparedExample, Task, task_from_json, task_to_json
from memtx.data.tasks.batches import BatchExamples, collate
from memtx.data.tasks.examples import SummaryExample, SummaryPrompt
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError, check_at_least
from memtx.inference.batching import ScoreOutput, ScoreRequest, score_segments
from memtx.inference.deadline import ClosedError, acquire_before, remaining_seconds
from memtx.inference.generate import generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer

T = TypeVar("T")

PredictInput = str | Mapping[str, Any]
"""A raw text, or the fields of an example; labels are optional."""


class BasePredictor(ABC):
    """Base class of predictors; threads that share one take turns. ``num_tokens_read`` counts input tokens."""

    task_name: str
    model: nn.Module
    chunk_size = 1  # inputs of a call that are worth waiting for together

    def __init__(self) -> None:
        self.num_tokens_read, self._closed = 0, False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the predictor: running and later calls raise ClosedError before they next call the model."""
        self._closed = True

    @abstractmethod
    def to_example(self, raw_input: PredictInput) -> Any:
        """Convert an input to an example without labels; raises DataError if it does not fit the task."""

    @abstractmethod
    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return a JSON-serializable prediction per input.

        Raises:
            DataError: An input does not fit the task or is too long; the message has its index.
            DeadlineExceededError: The deadline (``time.monotonic``) passed.
            ClosedError: The predictor was closed.
        """

    def _map_inputs(self, inputs: Sequence[PredictInput], convert: Callable[[PredictInput], T]) -> list[T]:
        """Convert every input; errors name the index of the input."""
        converted = []
        for index, raw_input in enumerate(inputs):
            try:
                converted.append(convert(raw_input))
            except DataError as error:
                prefix = f"Input {index}: " if len(inputs) > 1 else ""
                raise DataError(f"{prefix}{error.message}", error.hint) from error
        return converted

    def _check_active(self, deadline: float | None) -> None:
        remaining_seconds(deadline)
        if self._closed:
            raise ClosedError("The server is closing.", "Retry when it is back.")


class Predictor(BasePredictor):
    """Predicts with a model of one task, which is put into eval mode.

    ``max_batch_tokens`` limits the tokens in a padded batch; a longer window is read alone. Raises MemtxError if it is
    not positive, or model, tokenizer and task do not fit together.
    """

    model: TaskModel
    chunk_size = 64

    def __init__(
        self, model: TaskModel, tokenizer: HFTokenizer, task: Task, *, max_batch_tokens: int = 1 << 14
    ) -> None:
        super().__init__()
        check_at_least(1, max_batch_tokens=max_batch_tokens)
        if tokenizer.vocab_size > model.vocab_size or task.num_labels != model.num_labels:
            sizes = (
                f"Model ({model.vocab_size} tokens, {model.num_labels} labels), "
                f"tokenizer ({tokenizer.vocab_size} tokens) and task ({task.num_labels} labels)"
            )
            raise CheckpointError(f"{sizes} do not belong together.", "Use those of one training run.")
        self.model, self.tokenizer, self.task, self.max_batch_tokens = model.eval(), tokenizer, task, max_batch_tokens
        self.task_name = task.kind

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a training checkpoint, the best checkpoint of a run folder, or a folder written by :meth:`save`.

        Raises CheckpointError if it is missing, damaged, or does not hold a task model.
        """
        checkpoint = load(path)
        tokenizer, task = checkpoint.sidecars.get("tokenizer"), checkpoint.sidecars.get("task")
        if tokenizer is None or task is None:
            raise CheckpointError(f"'{checkpoint.path}' has no tokenizer or no task.", "Give a run trained on a task.")
        return cls(checkpoint.model_as(TaskModel), hf_tokenizer_from_json(tokenizer), task_from_json(task))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and task to the folder ``path``; the files contain no code."""
        for name, content in (("tokenizer", self.tokenizer.to_json()), ("task", task_to_json(self.task))):
            files.write_text(Path(path) / pretrained.SIDECAR_FILES[name], content)
        self.model.save_pretrained(path)

    def to_example(self, raw_input: PredictInput) -> Any:
        """Convert a raw text, or the fields of an example, to an example of the task."""
        if not isinstance(raw_input, str):
            return self.task.parse(raw_input, False)
        if not raw_input.strip():
            raise DataError("The text is empty.", "Give at least one word.")
        return self.task.from_text(raw_input)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the task's postprocessed prediction per input."""

        def encode(raw_input: PredictInput) -> PreparedExample:
            example = self.to_example(raw_input)
            # Labels are ignored, so they need not be valid.
            labels = {field.name for field in fields(example)} & {"label", "labels", "tags", "answers"}
            return self.task.prepare(replace(example, **dict.fromkeys(labels)), self.tokenizer)

        examples = self._map_inputs(inputs, encode)
        windows = [window for example in examples for window in example.windows]
        with acquire_before(deadline, self._lock):
            logits = self._compute_logits(windows, deadline)
        return BatchExamples(self.task, examples).postprocess(logits)

    def _compute_logits(self, windows: Sequence[EncodedExample], deadline: float | None) -> list[Logits]:
        logits: list[Logits] = [np.zeros(0, dtype=np.float32)] * len(windows)
        device = next(self.model.parameters()).device
        for indices in self._batch_indices(windows):
            self._check_active(deadline)
            batch = collate([windows[index] for index in indices], self.tokenizer.pad_token_id)
            inputs = (batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
            with torch.inference_mode():
                batch_logits = self.model(*(tensor.to(device) for tensor in inputs)).float().cpu().numpy()
            for index, window_logits in zip(indices, batch_logits, strict=True):
                logits[index] = window_logits
            self.num_tokens_read += int(batch.attention_mask.sum())
        return logits

    def _batch_indices(self, windows: Sequence[EncodedExample]) -> list[list[int]]:
        """Return the indices of the windows in each batch, sorted by length."""
        batches: list[list[int]] = [[]]
        for index in sorted(range(len(windows)), key=lambda index: len(windows[index].ids)):
            if batches[-1] and (len(batches[-1]) + 1) * len(windows[index].ids) > self.max_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches if windows else []


class Summarizer(BasePredictor):
    """Summarizes texts of any length in at most ``max_tokens`` tokens; the model is put into eval mode."""

    task_name = "summary"
    model: MemoryTransformer

    def __init__(
        self, model: MemoryTransformer, tokenizer: Tokenizer, summary_prompt: SummaryPrompt, *, max_tokens: int = 256
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.summary_prompt, self.max_tokens = summary_prompt, max_tokens

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a checkpoint or run folder; raises CheckpointError if it is damaged or was not trained on summaries."""
        options = _read_sidecars(path).get("summary")
        try:
            summary_prompt = SummaryPrompt(**json.loads(str(options)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' was not trained on summaries.", "Give a run that was.") from error
        return cls(*load_model_and_tokenizer(path), summary_prompt)

    def to_example(self, raw_input: PredictInput) -> SummaryExample:
        """Convert a raw text, or ``{"text": ...}``, to an example."""
        return SummaryExample.parse({"text": raw_input} if isinstance(raw_input, str) else raw_input, False)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the ``summary`` of each input, or the ``response`` to a dialogue.

        ``complete`` is False if it was cut at ``max_tokens``.
        """
        examples = self._map_inputs(inputs, self.to_example)
        with acquire_before(deadline, self._lock):
            return [self._summarize(example, deadline) for example in examples]

    def _summarize(self, example: SummaryExample, deadline: float | None) -> dict[str, Any]:
        prompt, stop_sequence = self.summary_prompt.format_prompt(example.text), self.summary_prompt.stop_sequence
        self.num_tokens_read += len(self.tokenizer.encode(prompt))
        greedy = SamplingParams(greedy=True)
        parts = []

        def score(request: ScoreRequest) -> ScoreOutput:
            self._check_active(deadline)
            return score_segments(self.model, [request])[0]

        reader = StreamReader(self.model, self.tokenizer, score_fn=score)
        options: dict[str, Any] = {"reader": reader, "max_tokens": self.max_tokens, "sampling_params": greedy}
        # Not stopped by generate(), to distinguish a complete summary from one cut at max_tokens.
        for part in generate(self.model, self.tokenizer, prompt, **options):
            self._check_active(deadline)
            parts.append(part)
            if stop_sequence in "".join(parts[-len(stop_sequence) - 1 :]):
                break
        summary, end, _ = "".join(parts).partition(stop_sequence)
        return {example.output_name: summary, "complete": bool(end)}


def load_predictor(path: str | os.PathLike[str]) -> BasePredictor:
    """Load the predictor for the model at ``path``; raises like its ``load``."""
    sidecars = _read_sidecars(path)
    if "text_to_text" in sidecars:
        from memtx.inference.text_to_text import TextToText  # which has this module's base class

        return TextToText.load(path)
    return Summarizer.load(path) if "summary" in sidecars else Predictor.load(path)


def is_task_model(path: str | os.PathLike[str]) -> bool:
    """Return whether the model at ``path`` was trained on a task.

    Raises CheckpointError if the checkpoint is missing, damaged, or not from memtx.
    """
    return not pretrained.TASK_SIDECARS.isdisjoint(_read_sidecars(path))


def _read_sidecars(path: str | os.PathLike[str]) -> Mapping[str, str]:
    return pretrained.read_sidecars(pretrained.resolve_model_path(path))
