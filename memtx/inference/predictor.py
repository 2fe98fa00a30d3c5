"""Predictors: raw texts or examples in; labels, tags, answers or summaries out."""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import nn

from memtx import files
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.hf_tokenizers import HFTokenizer, hf_tokenizer_from_json
from memtx.data.tasks.base import EncodedExample, Logits, Task, task_from_json, task_to_json
from memtx.data.tasks.batches import BatchExamples, PreparedExample, collate, encode_examples
from memtx.data.tasks.examples import SummaryExample, SummaryPrompt
from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError, check_at_least
from memtx.inference.deadline import ClosedError, acquire_before, remaining_seconds
from memtx.inference.generate import generate
from memtx.inference.sampling import SamplingParams
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer

T = TypeVar("T")

PredictInput = str | Mapping[str, Any]
"""A raw text, or the fields of an example; labels are optional."""

MAX_BATCH_TOKENS = 1 << 14
"""Maximum number of tokens in a batch, with padding; a longer window is read alone."""


class BasePredictor(ABC):
    """A model that answers inputs; threads that share it take turns.

    Attributes:
        task_name: Name of the task.
        model: Model in eval mode, on any device.
        num_tokens_read: Number of tokens read so far.
    """

    task_name: str
    model: nn.Module

    def __init__(self) -> None:
        self.num_tokens_read = 0
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Stop: running and later calls raise ClosedError before their next call of the model."""
        self._closed = True

    @abstractmethod
    def to_example(self, raw_input: PredictInput) -> Any:
        """Return an input as an example without labels.

        Raises:
            DataError: The input does not fit the task.
        """

    @abstractmethod
    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return a JSON-serializable prediction per input.

        Args:
            inputs: Raw texts or fields of examples.
            deadline: Deadline as a time of ``time.monotonic``. None disables it.

        Raises:
            DataError: An input does not fit the task or is too long; the message holds its index.
            DeadlineExceededError: The deadline has passed.
            ClosedError: The predictor was closed.
        """

    def _map_inputs(self, inputs: Sequence[PredictInput], convert: Callable[[PredictInput], T]) -> list[T]:
        """Convert every input; an error names the index of its input."""
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
    """Answers inputs of one task with a task model.

    Args:
        model: Task model; put into eval mode.
        tokenizer: Tokenizer of the model.
        task: Task that the model was trained on.
        max_batch_tokens: Maximum number of tokens in a batch, with padding; results are equal up to rounding.

    Raises:
        MemtxError: ``max_batch_tokens`` is not positive, or model, tokenizer and task do not fit together.
    """

    model: TaskModel

    def __init__(
        self, model: TaskModel, tokenizer: HFTokenizer, task: Task, *, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> None:
        super().__init__()
        check_at_least(1, max_batch_tokens=max_batch_tokens)
        if tokenizer.vocab_size > model.vocab_size or task.num_labels != model.num_labels:
            raise CheckpointError(
                f"Model, tokenizer and task do not belong together: the model has {model.vocab_size} tokens and "
                f"{model.num_labels} labels, the tokenizer {tokenizer.vocab_size} tokens, the task {task.num_labels} "
                "labels.",
                "Use the tokenizer and the task that the model was trained with.",
            )
        self.model, self.tokenizer, self.task, self.max_batch_tokens = model.eval(), tokenizer, task, max_batch_tokens
        self.task_name = task.kind

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a training checkpoint, the best checkpoint of a run folder, or a folder written by :meth:`save`.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, or not of a task model.
        """
        model_path = pretrained.resolve_model_path(path)
        sidecars = read_task_metadata(model_path)
        tokenizer, task = sidecars.get("tokenizer"), sidecars.get("task")
        if not isinstance(tokenizer, str) or not isinstance(task, str):
            raise CheckpointError(f"'{model_path}' has no tokenizer or no task.", "Give a run on examples.")
        model = TaskModel.from_pretrained(model_path)
        return cls(model, hf_tokenizer_from_json(tokenizer), task_from_json(task))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and task into the folder ``path``; the files contain no code."""
        for name, content in (("tokenizer", self.tokenizer.to_json()), ("task", task_to_json(self.task))):
            files.write_text(Path(path) / pretrained.SIDECAR_FILES[name], content)
        self.model.save_pretrained(path)

    def to_example(self, raw_input: PredictInput) -> Any:
        """Return a raw text, or the fields of an example, as an example without labels; raises DataError."""
        if not isinstance(raw_input, str):
            return self.task.parse(raw_input, False)
        if not raw_input.strip():
            raise DataError("The text is empty.", "Give a text.")
        return self.task.from_text(raw_input)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the task's ``postprocess`` of each input."""
        examples = self._map_inputs(inputs, self._encode_input)
        windows = [window for example in examples for window in example.windows]
        with acquire_before(deadline, self._lock):
            logits = self._compute_scores(windows, deadline)
        return BatchExamples(self.task, examples).postprocess(logits)

    def _encode_input(self, raw_input: PredictInput) -> PreparedExample:
        # Labels are ignored, so they need not be valid.
        return encode_examples([drop_labels(self.to_example(raw_input))], self.task, self.tokenizer)[0]

    def _compute_scores(self, encoded_examples: Sequence[EncodedExample], deadline: float | None) -> list[Logits]:
        logits: list[Logits] = [np.zeros(0, dtype=np.float32)] * len(encoded_examples)
        device = next(self.model.parameters()).device
        for indices in self._batch_indices(encoded_examples):
            self._check_active(deadline)
            batch = collate([encoded_examples[index] for index in indices], self.tokenizer.pad_token_id)
            inputs = (batch.tokens, batch.attention_mask, batch.token_type_ids, batch.global_attention_mask)
            with torch.inference_mode():
                batch_logits = self.model(*(tensor.to(device) for tensor in inputs)).float().cpu().numpy()
            for index, example_logits in zip(indices, batch_logits, strict=True):
                logits[index] = example_logits
            self.num_tokens_read += int(batch.attention_mask.sum())
        return logits

    def _batch_indices(self, encoded_examples: Sequence[EncodedExample]) -> Iterator[list[int]]:
        """Yield the indices of each batch, sorted by length."""
        batch: list[int] = []
        for index in sorted(range(len(encoded_examples)), key=lambda index: len(encoded_examples[index].ids)):
            if batch and (len(batch) + 1) * len(encoded_examples[index].ids) > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


class Summarizer(BasePredictor):
    """Writes summaries of texts of any length with a decoder trained on texts and summaries.

    Args:
        model: Decoder; put into eval mode.
        tokenizer: Tokenizer of the model.
        summary_prompt: Prompt and stop sequence.
        max_tokens: Maximum number of tokens per summary.
    """

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
        """Load a training checkpoint, or the best checkpoint of a run folder.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, or not trained on summaries.
        """
        options = read_task_metadata(path).get("summary")
        try:
            summary_prompt = SummaryPrompt(**json.loads(str(options)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"'{path}' was not trained on summaries.", "Give a run on such examples.") from error
        return cls(*load_model_and_tokenizer(path), summary_prompt)

    def to_example(self, raw_input: PredictInput) -> SummaryExample:
        """Return a raw text, or ``{"text": ...}``, as an example without a summary; raises DataError."""
        return SummaryExample.parse({"text": raw_input} if isinstance(raw_input, str) else raw_input, False)

    def predict(self, inputs: Sequence[PredictInput], *, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return the ``summary`` of each input, and whether it is ``complete`` or cut at ``max_tokens``."""
        texts = self._map_inputs(inputs, lambda raw_input: self.to_example(raw_input).text)
        with acquire_before(deadline, self._lock):
            return [self._summarize(text, deadline) for text in texts]

    def _summarize(self, text: str, deadline: float | None) -> dict[str, Any]:
        prompt, stop_sequence = self.summary_prompt.format_prompt(text), self.summary_prompt.stop_sequence
        self.num_tokens_read += len(self.tokenizer.encode(prompt))
        greedy = SamplingParams(greedy=True)
        parts = []
        # Not stopped by generate(), so that a complete summary can be told from one cut at max_tokens.
        for part in generate(self.model, self.tokenizer, prompt, max_tokens=self.max_tokens, sampling_params=greedy):
            self._check_active(deadline)
            parts.append(part)
            if stop_sequence in "".join(parts[-len(stop_sequence) - 1 :]):
                break
        summary, end, _ = "".join(parts).partition(stop_sequence)
        return {"summary": summary, "complete": bool(end)}


def load_predictor(path: str | os.PathLike[str]) -> Predictor | Summarizer:
    """Load the predictor for the model at ``path``; raises what its ``load`` raises."""
    return Summarizer.load(path) if "summary" in read_task_metadata(path) else Predictor.load(path)


def drop_labels(example: Any) -> Any:
    """Return an example with its labels set to None."""
    names = {field.name for field in fields(example)} & {"label", "tags", "answers"}
    return replace(example, **dict.fromkeys(names))


def is_task_model(path: str | os.PathLike[str]) -> bool:
    """Return whether the model at ``path`` was trained on a task.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or not of memtx.
    """
    return bool(read_task_metadata(path))


def read_task_metadata(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the ``tokenizer`` and the ``task`` or ``summary`` of a checkpoint or folder as JSON texts.

    Empty if the model was not trained on a task; raises what :func:`is_task_model` raises.
    """
    sidecars = pretrained.read_sidecars(pretrained.resolve_model_path(path))
    return sidecars if sidecars.keys() & {"task", "summary"} else {}
