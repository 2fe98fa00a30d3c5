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

from memtx.data.batch import IGNORED
from memtx.data.questions import Questions
from memtx.data.tags import Tagging, spans_of
from memtx.data.task import Task
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError, at_least
from memtx.inference.predictor import Predictor
from memtx.metrics import AnswerF1, BitsPerByte, SpanF1
from memtx.models.memory_transformer import MemoryTransformer
from memtx.segment import Segment

Watch = Callable[[], None]
"""Called after each call of a model."""


REPEATS = 5
"""Calls of one input, of which the fastest counts: whatever else the machine does makes a call slower, never faster."""


@dataclass(frozen=True)
class Beside:
    """One model among others.

    Attributes:
        name: as the user knows it.
        parameters: how many.
        milliseconds: of a call (see :func:`timed`).
        score: of the measure.
        measure: what is measured: accuracy, f1, or bits_per_byte.
    """

    name: str
    parameters: int
    milliseconds: float
    score: float
    measure: str

    def smaller(self, teacher: Beside) -> float:
        """Return the share of the teacher's parameters that it does without."""
        return 1.0 - self.parameters / teacher.parameters

    def faster(self, teacher: Beside) -> float:
        """Return how much more it reads in the same time, as a share of what the teacher reads."""
        return teacher.milliseconds / self.milliseconds - 1.0

    def kept(self, teacher: Beside) -> float:
        """Return the share of the teacher's quality that it has; bits count inversely."""
        if self.measure == "bits_per_byte":
            return teacher.score / self.score
        return self.score / teacher.score if teacher.score else float("nan")


def parameters(model: nn.Module) -> int:
    """Return how many numbers a model has learned; tied ones count once."""
    return sum(one.numel() for one in model.parameters())


def timed(calls: Sequence[Callable[[int], object]], inputs: int, watch: Watch = lambda: None) -> list[float]:
    """Return the milliseconds of each of the calls, which take turns: the median over inputs of the fastest of each.

    Args:
        calls: each is given the number of an input, from 0.
        inputs: how many there are.
        watch: called after each call.
    """
    at_least(1, inputs=inputs)
    found: list[list[float]] = [[] for _ in calls]
    for number in range(inputs):
        best = [float("inf")] * len(calls)
        for _ in range(REPEATS):
            for place, call in enumerate(calls):
                began = time.perf_counter()
                call(number)
                best[place] = min(best[place], 1000.0 * (time.perf_counter() - began))
                watch()
        for times, one in zip(found, best, strict=True):
            times.append(one)
    return [statistics.median(times) for times in found]


def measure_of(task: Task) -> str:
    """Return what a task is measured by."""
    return "f1" if isinstance(task, Tagging | Questions) else "accuracy"


def task_score(task: Task, examples: Sequence[Any], answers: Iterable[dict[str, Any]]) -> float:
    """Return the measure of answers to labelled examples: accuracy, F1 of spans (seqeval's) or of answers (SQuAD's).

    Args:
        task: of both.
        examples: with labels.
        answers: what a model said of each, in order.
    """
    if isinstance(task, Tagging):
        spans = SpanF1()
        for one, said in zip(examples, answers, strict=True):
            spans.update(spans_of(said["tags"]), spans_of(one.tags))
        return float(spans.compute())
    if isinstance(task, Questions):
        words = AnswerF1()
        for one, said in zip(examples, answers, strict=True):
            words.update(said["answer"], [answer.text for answer in one.answers])
        return float(words.compute())
    right = [said["label"] == one.label for one, said in zip(examples, answers, strict=True)]
    return float(sum(right) / len(right))


@dataclass(frozen=True)
class Asked:
    """An example as a file has it, and as it was understood."""

    record: dict[str, Any]
    example: Any


def tasks_beside(
    named: Sequence[tuple[str, Predictor]], examples: Sequence[Asked], *, calls: int = 20, watch: Watch = lambda: None
) -> list[Beside]:
    """Put models of one task beside one another; a call is one example.

    Args:
        named: models by name.
        examples: with labels.
        calls: examples that are timed, the first ones, each several times.
        watch: called after each example of each model, timed or scored.
    """
    scores = []
    for _, predictor in named:
        said = []
        for one in examples:
            said += predictor.predict([one.record])
            watch()
        scores.append(task_score(predictor.task, [one.example for one in examples], said))
    asked = [
        lambda number, own=predictor: own.predict([examples[number].record])  # type: ignore[misc]
        for _, predictor in named
    ]
    spent = timed(asked, min(calls, len(examples)), watch)
    measure = measure_of(named[0][1].task)
    return [
        Beside(name, parameters(predictor.model), taken, score, measure)
        for (name, predictor), taken, score in zip(named, spent, scores, strict=True)
    ]


@dataclass(frozen=True)
class Texts:
    """Beginnings of documents, side by side.

    Attributes:
        tokens: (rows, length) int64.
        labels: (rows, length) int64, the token that follows; -100 behind a document's end.
        bytes: (rows, length) int64, those that a label stands for.
    """

    tokens: Tensor
    labels: Tensor
    bytes: Tensor

    @classmethod
    def of(cls, documents: Iterable[Any], tokenizer: Tokenizer, length: int) -> Texts:
        """Take so many tokens of each document.

        Raises:
            DataError: there is no document with two tokens.
        """
        rows = []
        for document in documents:
            found = [tokenizer.begin]
            for part in tokenizer.encode_stream(document.chunks()):
                found += part.tolist()
                if len(found) > length:
                    break
            if len(found) > 1:
                rows.append(found[: length + 1])
        if not rows:
            raise DataError("There is no text to be measured on.", "Give a folder with texts in that split.")
        longest = max(map(len, rows))
        whole = torch.full((len(rows), longest), IGNORED)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = torch.tensor(row)
        size = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
        labels = whole[:, 1:]
        tokens = torch.where(whole[:, :-1] == IGNORED, tokenizer.begin, whole[:, :-1])
        return cls(tokens, labels, torch.where(labels == IGNORED, 0, size[labels.clamp(min=0)]))


@torch.inference_mode()
def bits_per_byte(
    model: MemoryTransformer, texts: Texts, *, segment: int, beyond: int = 0, watch: Watch = lambda: None
) -> float:
    """Return the bits per byte of tokens whose position in their document is ``beyond`` or more.

    Args:
        model: in eval mode.
        texts: what is read.
        segment: tokens a call.
        beyond: first position that counts.
        watch: called after each call.
    """
    device = model.embedding.weight.device
    metric, state = BitsPerByte().to(device), model.init_state(len(texts.tokens))
    for at in range(0, texts.tokens.shape[1], segment):
        tokens, labels, size = (
            part[:, at : at + segment].to(device) for part in (texts.tokens, texts.labels, texts.bytes)
        )
        position = Segment.locate(state.position, tokens.shape[1]).position
        out = model(tokens, state, labels=labels)
        state = out.state
        assert out.nll is not None
        counted = position >= beyond
        metric.update(out.nll.double() * counted, size * counted)
        watch()
    return float(metric.compute())


def texts_beside(
    named: Sequence[tuple[str, MemoryTransformer]],
    texts: Texts,
    *,
    segment: int,
    beyond: int = 0,
    calls: int = 20,
    watch: Watch = lambda: None,
) -> list[Beside]:
    """Put language models beside one another; a call is a segment of the first text, read on and on.

    Args:
        named: models by name, in eval mode.
        texts: what is read.
        segment: tokens a call.
        beyond: first position that counts for the score.
        calls: segments that are timed, each several times.
        watch: called after each call of each model, timed or scored.
    """
    whole = max(1, texts.tokens.shape[1] // segment)

    def reader(model: MemoryTransformer) -> Callable[[int], object]:
        states = [model.init_state(1)]
        row = texts.tokens[:1].to(model.embedding.weight.device)

        @torch.inference_mode()
        def read(number: int) -> None:
            at = number % whole * segment
            states[0] = model(row[:, at : at + segment], states[0]).state

        return read

    scores = [bits_per_byte(model, texts, segment=segment, beyond=beyond, watch=watch) for _, model in named]
    spent = timed([reader(model) for _, model in named], calls, watch)
    return [
        Beside(name, parameters(model), taken, score, "bits_per_byte")
        for (name, model), taken, score in zip(named, spent, scores, strict=True)
    ]
