"""Models beside one another on the same texts: how large they are, how long a call takes, and how well they do.

Calls are timed in turn, one of each model on the same input, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtx.data.batch import IGNORE_INDEX
from memtx.data.sources.base import Document
from memtx.data.tasks.base import Task
from memtx.data.tasks.question_answering import QuestionAnswering
from memtx.data.tasks.tagging import Tagging, extract_spans
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError, check_at_least
from memtx.inference.predictor import Predictor
from memtx.metrics import AnswerF1, BitsPerByte, SpanF1
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

ProgressCallback = Callable[[], None]
"""Called after each call of a model."""


REPEATS = 5
"""Calls of one input, of which the fastest counts: whatever else the machine does makes a call slower, never faster."""


@dataclass(frozen=True)
class ModelComparison:
    """One model among others.

    Attributes:
        name: as the user knows it.
        num_parameters: how many.
        latency_ms: of a call (see :func:`time_calls`).
        score: of the metric.
        metric: what is measured: accuracy, f1, or bits_per_byte.
    """

    name: str
    num_parameters: int
    latency_ms: float
    score: float
    metric: str

    def size_reduction(self, teacher: ModelComparison) -> float:
        """Return the share of the teacher's parameters that it does without."""
        return 1.0 - self.num_parameters / teacher.num_parameters

    def speed_gain(self, teacher: ModelComparison) -> float:
        """Return how much more it reads in the same time, as a share of what the teacher reads."""
        return teacher.latency_ms / self.latency_ms - 1.0

    def score_retention(self, teacher: ModelComparison) -> float:
        """Return the share of the teacher's quality that it has; bits count inversely."""
        if self.metric == "bits_per_byte":
            return teacher.score / self.score
        return self.score / teacher.score if teacher.score else float("nan")


def num_parameters(model: nn.Module) -> int:
    """Return how many numbers a model has learned; tied ones count once."""
    return sum(one.numel() for one in model.parameters())


def time_calls(
    functions: Sequence[Callable[[int], object]], num_inputs: int, on_progress: ProgressCallback = lambda: None
) -> list[float]:
    """Return the milliseconds of each of the calls, which take turns: the median over inputs of the fastest of each.

    Args:
        functions: each is given the number of an input, from 0.
        num_inputs: how many there are.
        on_progress: called after each call.
    """
    check_at_least(1, num_inputs=num_inputs)
    found: list[list[float]] = [[] for _ in functions]
    for number in range(num_inputs):
        best = [float("inf")] * len(functions)
        for _ in range(REPEATS):
            for place, call in enumerate(functions):
                began = time.perf_counter()
                call(number)
                best[place] = min(best[place], 1000.0 * (time.perf_counter() - began))
                on_progress()
        for times, one in zip(found, best, strict=True):
            times.append(one)
    return [statistics.median(times) for times in found]


def metric_name(task: Task) -> str:
    """Return what a task is measured by."""
    return "f1" if isinstance(task, Tagging | QuestionAnswering) else "accuracy"


def compute_task_score(task: Task, examples: Sequence[Any], predictions: Iterable[dict[str, Any]]) -> float:
    """Return the measure of answers to labelled examples: accuracy, F1 of spans (seqeval's) or of answers (SQuAD's).

    Args:
        task: of both.
        examples: with labels.
        predictions: what a model said of each, in order.
    """
    if isinstance(task, Tagging):
        spans = SpanF1()
        for one, said in zip(examples, predictions, strict=True):
            spans.update(extract_spans(said["tags"]), extract_spans(one.tags))
        return float(spans.compute())
    if isinstance(task, QuestionAnswering):
        words = AnswerF1()
        for one, said in zip(examples, predictions, strict=True):
            words.update(said["answer"], [answer.text for answer in one.answers])
        return float(words.compute())
    right = [said["label"] == one.label for one, said in zip(examples, predictions, strict=True)]
    return float(sum(right) / len(right))


@dataclass(frozen=True)
class ParsedRecord:
    """An example as a file has it, and as it was understood."""

    record: dict[str, Any]
    example: Any


def compare_task_models(
    predictors: Sequence[tuple[str, Predictor]],
    examples: Sequence[ParsedRecord],
    *,
    num_timed: int = 20,
    on_progress: ProgressCallback = lambda: None,
) -> list[ModelComparison]:
    """Put models of one task beside one another; a call is one example.

    Args:
        predictors: models by name.
        examples: with labels.
        num_timed: examples that are timed, the first ones, each several times.
        on_progress: called after each example of each model, timed or scored.
    """
    scores = []
    for _, predictor in predictors:
        said = []
        for one in examples:
            said += predictor.predict([one.record])
            on_progress()
        scores.append(compute_task_score(predictor.task, [one.example for one in examples], said))
    asked = [
        lambda number, own=predictor: own.predict([examples[number].record])  # type: ignore[misc]
        for _, predictor in predictors
    ]
    spent = time_calls(asked, min(num_timed, len(examples)), on_progress)
    measure = metric_name(predictors[0][1].task)
    return [
        ModelComparison(name, num_parameters(predictor.model), taken, score, measure)
        for (name, predictor), taken, score in zip(predictors, spent, scores, strict=True)
    ]


@dataclass(frozen=True)
class TextBatch:
    """Beginnings of documents, side by side.

    Attributes:
        tokens: (batch, length) int64.
        labels: (batch, length) int64, the token that follows; -100 behind a document's end.
        label_bytes: (batch, length) int64, those that a label stands for.
    """

    tokens: Tensor
    labels: Tensor
    label_bytes: Tensor

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer, max_length: int) -> TextBatch:
        """Take so many tokens of each document.

        Raises:
            DataError: there is no document with two tokens.
        """
        rows = []
        for document in documents:
            found = [tokenizer.bos_token_id]
            for part in tokenizer.encode_stream(document.iter_text()):
                found += part.tolist()
                if len(found) > max_length:
                    break
            if len(found) > 1:
                rows.append(found[: max_length + 1])
        if not rows:
            raise DataError("There is no text to be measured on.", "Give a folder with texts in that split.")
        longest = max(map(len, rows))
        whole = torch.full((len(rows), longest), IGNORE_INDEX)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = torch.tensor(row)
        size = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
        labels = whole[:, 1:]
        tokens = torch.where(whole[:, :-1] == IGNORE_INDEX, tokenizer.bos_token_id, whole[:, :-1])
        return cls(tokens, labels, torch.where(labels == IGNORE_INDEX, 0, size[labels.clamp(min=0)]))


@torch.inference_mode()
def bits_per_byte(
    model: MemoryTransformer,
    batch: TextBatch,
    *,
    segment_length: int,
    min_position: int = 0,
    on_progress: ProgressCallback = lambda: None,
) -> float:
    """Return the bits per byte of tokens whose position in their document is ``min_position`` or more.

    Args:
        model: in eval mode.
        batch: what is read.
        segment_length: tokens a call.
        min_position: first position that counts.
        on_progress: called after each call.
    """
    device = model.embedding.weight.device
    metric, state = BitsPerByte().to(device), model.init_state(len(batch.tokens))
    for at in range(0, batch.tokens.shape[1], segment_length):
        tokens, labels, size = (
            part[:, at : at + segment_length].to(device) for part in (batch.tokens, batch.labels, batch.label_bytes)
        )
        position = Segment.from_document_starts(state.position, tokens.shape[1]).position
        out = model(tokens, state, labels=labels)
        state = out.state
        assert out.nll is not None
        counted = position >= min_position
        metric.update(out.nll.double() * counted, size * counted)
        on_progress()
    return float(metric.compute())


def compare_language_models(
    models: Sequence[tuple[str, MemoryTransformer]],
    batch: TextBatch,
    *,
    segment_length: int,
    min_position: int = 0,
    num_timed: int = 20,
    on_progress: ProgressCallback = lambda: None,
) -> list[ModelComparison]:
    """Put language models beside one another; a call is a segment of the first text, read on and on.

    Args:
        models: models by name, in eval mode.
        batch: what is read.
        segment_length: tokens a call.
        min_position: first position that counts for the score.
        num_timed: segments that are timed, each several times.
        on_progress: called after each call of each model, timed or scored.
    """
    whole = max(1, batch.tokens.shape[1] // segment_length)

    def reader(model: MemoryTransformer) -> Callable[[int], object]:
        states = [model.init_state(1)]
        row = batch.tokens[:1].to(model.embedding.weight.device)

        @torch.inference_mode()
        def read(number: int) -> None:
            at = number % whole * segment_length
            states[0] = model(row[:, at : at + segment_length], states[0]).state

        return read

    scores = [
        bits_per_byte(model, batch, segment_length=segment_length, min_position=min_position, on_progress=on_progress)
        for _, model in models
    ]
    spent = time_calls([reader(model) for _, model in models], num_timed, on_progress)
    return [
        ModelComparison(name, num_parameters(model), taken, score, "bits_per_byte")
        for (name, model), taken, score in zip(models, spent, scores, strict=True)
    ]
