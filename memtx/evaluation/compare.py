"""Comparison of models on the same texts: size, latency and score."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memtx.data.batch import IGNORE_INDEX
from memtx.data.sources.base import Document
from memtx.data.tasks.base import Task
from memtx.data.tasks.question_answering import QuestionAnswering
from memtx.data.tasks.tagging import Tagging, extract_spans
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError, check_at_least
from memtx.inference.predictor import Predictor
from memtx.metrics import AnswerF1, BitsPerByte, SpanF1
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.segment import Segment

ProgressCallback = Callable[[], None]
"""Called after each call of a model."""

REPEATS = 5
"""Calls per input, of which the fastest counts, since other load only slows a call down."""


@dataclass(frozen=True)
class ModelComparison:
    """Size, latency in milliseconds (see :func:`time_calls`) and score of one model.

    ``metric`` is the name of the score: ``accuracy``, ``f1`` or ``bits_per_byte``.
    """

    name: str
    num_parameters: int
    latency_ms: float
    score: float
    metric: str

    def size_reduction(self, teacher: ModelComparison) -> float:
        """Return the fraction of the teacher's parameters that this model saves."""
        return 1.0 - self.num_parameters / teacher.num_parameters

    def speed_gain(self, teacher: ModelComparison) -> float:
        """Return the gain in throughput over the teacher, as a fraction of the teacher's."""
        return teacher.latency_ms / self.latency_ms - 1.0

    def score_retention(self, teacher: ModelComparison) -> float:
        """Return this model's score as a fraction of the teacher's; the inverse for bits per byte."""
        if self.metric == "bits_per_byte":
            return teacher.score / self.score
        return self.score / teacher.score if teacher.score else float("nan")


class ParameterizedLanguageModel(RecurrentLanguageModel, Protocol):
    """A language model whose parameters can be counted."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters; tied parameters once."""
        ...


def num_parameters(model: nn.Module | ParameterizedLanguageModel) -> int:
    """Return the number of parameters of a model; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def time_calls(
    functions: Sequence[Callable[[int], object]], num_inputs: int, on_progress: ProgressCallback = lambda: None
) -> list[float]:
    """Return the latency of each function in milliseconds: the median over inputs of the fastest of ``REPEATS`` calls.

    The functions are called in turn with the index of an input, so that other load on the machine affects all equally.
    Raises MemtxError if ``num_inputs`` is not positive.
    """
    check_at_least(1, num_inputs=num_inputs)
    latencies: list[list[float]] = [[float("inf")] * num_inputs for _ in functions]
    for index in range(num_inputs):
        for _ in range(REPEATS):
            for function, fastest in zip(functions, latencies, strict=True):
                start = time.perf_counter()
                function(index)
                fastest[index] = min(fastest[index], 1000.0 * (time.perf_counter() - start))
                on_progress()
    return [statistics.median(fastest) for fastest in latencies]


def metric_name(task: Task) -> str:
    """Return the name of a task's metric."""
    return "f1" if isinstance(task, Tagging | QuestionAnswering) else "accuracy"


def compute_task_score(task: Task, examples: Sequence[Any], predictions: Iterable[dict[str, Any]]) -> float:
    """Return the accuracy, the F1 of spans (as seqeval) or the F1 of answers (as SQuAD) for labeled examples."""
    pairs = zip(examples, predictions, strict=True)
    if isinstance(task, Tagging):
        span_f1 = SpanF1()
        for example, prediction in pairs:
            span_f1.update(extract_spans(prediction["tags"]), extract_spans(example.tags))
        return float(span_f1.compute())
    if isinstance(task, QuestionAnswering):
        answer_f1 = AnswerF1()
        for example, prediction in pairs:
            answer_f1.update(prediction["answer"], [answer.text for answer in example.answers])
        return float(answer_f1.compute())
    return statistics.mean(float(prediction["label"] == example.label) for example, prediction in pairs)


@dataclass(frozen=True)
class ParsedRecord:
    """The fields of an example, and the example parsed from them."""

    record: dict[str, Any]
    example: Any


def compare_task_models(
    predictors: Sequence[tuple[str, Predictor]],
    examples: Sequence[ParsedRecord],
    *,
    num_timed: int = 20,
    on_progress: ProgressCallback = lambda: None,
) -> list[ModelComparison]:
    """Compare models of one task on labeled examples, one per call; ``num_timed`` of them are timed."""

    def predict(predictor: Predictor, index: int) -> None:
        predictor.predict([examples[index].record])

    scores = []
    for _, predictor in predictors:
        predictions = []
        for parsed in examples:
            predictions += predictor.predict([parsed.record])
            on_progress()
        scores.append(compute_task_score(predictor.task, [parsed.example for parsed in examples], predictions))
    functions = [partial(predict, predictor) for _, predictor in predictors]
    latencies = time_calls(functions, min(num_timed, len(examples)), on_progress)
    return [
        ModelComparison(name, num_parameters(predictor.model), latency, score, metric_name(predictor.task))
        for (name, predictor), latency, score in zip(predictors, latencies, scores, strict=True)
    ]


@dataclass(frozen=True)
class TextBatch:
    """Beginnings of documents as a batch.

    Attributes:
        tokens: ``(batch, length)`` int64.
        labels: ``(batch, length)`` int64, next token; -100 after the end of a document.
        label_bytes: ``(batch, length)`` int64, bytes of each label.
    """

    tokens: Tensor
    labels: Tensor
    label_bytes: Tensor

    @classmethod
    def from_documents(cls, documents: Iterable[Document], tokenizer: Tokenizer, max_length: int) -> TextBatch:
        """Build a batch from the first ``max_length`` tokens of each document; raises DataError if all are empty."""
        sequences = []
        for document in documents:
            ids = tokenizer.bos_token_ids
            for chunk in tokenizer.encode_stream(document.iter_text()):
                ids += chunk.tolist()
                if len(ids) > max_length:
                    break
            if len(ids) > 1:
                sequences.append(torch.tensor(ids[: max_length + 1]))
        if not sequences:
            raise DataError("There is no text to evaluate on.", "Give a folder with texts in this split.")
        ids_batch = pad_sequence(sequences, batch_first=True, padding_value=IGNORE_INDEX)
        sizes = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
        tokens, labels = ids_batch[:, :-1], ids_batch[:, 1:]
        tokens = torch.where(tokens == IGNORE_INDEX, tokenizer.pad_id, tokens)
        return cls(tokens, labels, torch.where(labels == IGNORE_INDEX, 0, sizes[labels.clamp(min=0)]))


@torch.inference_mode()
def bits_per_byte(
    model: RecurrentLanguageModel,
    batch: TextBatch,
    *,
    segment_length: int,
    min_position: int = 0,
    on_progress: ProgressCallback = lambda: None,
) -> float:
    """Return the bits per byte of tokens at position ``min_position`` or later in their documents."""
    state = model.init_state(len(batch.tokens))
    device = state.position.device
    metric = BitsPerByte().to(device)
    splits = [torch.split(tensor, segment_length, 1) for tensor in (batch.tokens, batch.labels, batch.label_bytes)]
    for segments in zip(*splits, strict=True):
        tokens, labels, label_bytes = (tensor.to(device) for tensor in segments)
        position = Segment.from_document_starts(state.position, tokens.shape[1]).position
        output = model(tokens, state, labels=labels)
        state = output.state
        assert output.nll is not None
        is_counted = position >= min_position
        metric.update(output.nll.double() * is_counted, label_bytes * is_counted)
        on_progress()
    return float(metric.compute())


def compare_language_models(
    models: Sequence[tuple[str, ParameterizedLanguageModel]],
    batch: TextBatch,
    *,
    segment_length: int,
    min_position: int = 0,
    num_timed: int = 20,
    on_progress: ProgressCallback = lambda: None,
) -> list[ModelComparison]:
    """Compare language models in eval mode, by the score of :func:`bits_per_byte`.

    ``num_timed`` calls are timed; each reads one segment of the first text, restarting at its end.
    """
    num_segments = max(1, batch.tokens.shape[1] // segment_length)

    def read_fn(model: RecurrentLanguageModel) -> Callable[[int], None]:
        state = model.init_state(1)
        tokens = batch.tokens[:1].to(state.position.device)

        @torch.inference_mode()
        def read(index: int) -> None:
            nonlocal state
            start = index % num_segments * segment_length
            state = model(tokens[:, start : start + segment_length], state).state

        return read

    scores = [
        bits_per_byte(model, batch, segment_length=segment_length, min_position=min_position, on_progress=on_progress)
        for _, model in models
    ]
    latencies = time_calls([read_fn(model) for _, model in models], num_timed, on_progress)
    return [
        ModelComparison(name, num_parameters(model), latency, score, "bits_per_byte")
        for (name, model), latency, score in zip(models, latencies, scores, strict=True)
    ]
