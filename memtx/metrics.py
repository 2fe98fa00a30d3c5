"""Metrics that torchmetrics lacks: bits per byte, PG-19's word perplexity, SQuAD's, CoNLL's and retrieval's scores.

The first two sum in float64 and divide once, at the end: a mean of batch means would weight short and long batches
equally, and a float32 sum stops growing after about ten million tokens.
"""

from __future__ import annotations

import math
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from memtx.errors import MemtxError
from memtx.word_measure import MAX_WORD_PERPLEXITY, is_word_measure


class _SumMetric(Metric):
    """Metric whose states are sums over batches and processes."""

    is_differentiable = False
    full_state_update = False

    def _add_sums(self, *names: str, dtype: torch.dtype) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")


class _NllPerUnit(_SumMetric):
    """Sum of negative log-likelihoods, divided by the number of bytes or words in the raw text."""

    higher_is_better = False
    unit = "units"

    nll: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sums("nll", "units", dtype=torch.float64)

    def set_dtype(self, dst_type: str | torch.dtype) -> _NllPerUnit:
        """Keep float64 at any precision of the model."""
        return self

    def _apply(self, fn: object, *arguments: object, **options: object) -> _NllPerUnit:
        # Module.half() and the like reach states through _apply; only the device may follow the model.
        nll, units = self.nll, self.units
        super()._apply(fn, *arguments, **options)  # type: ignore[arg-type]
        self.nll, self.units = nll.to(self.nll.device), units.to(self.units.device)
        return self

    def update(self, nll: Tensor | float, units: Tensor | int) -> None:
        """Add a batch: its negative log-likelihood in nats, and the number of bytes or words in its raw text.

        Both are sums, or tensors of any shape to sum. Raises MemtxError if the likelihood is not finite, or the number
        of units is negative.
        """
        nll_sum = torch.as_tensor(nll, dtype=torch.float64, device=self.nll.device).detach().sum()
        unit_sum = torch.as_tensor(units, dtype=torch.float64, device=self.units.device).detach().sum()
        name = type(self).__name__
        if not math.isfinite(nll_sum.item()):
            message = f"{name} got a negative log-likelihood of {nll_sum.item()}, expected a finite one."
            raise MemtxError(message, "The loss diverged: lower the learning rate or clip the gradient.")
        if not unit_sum.item() >= 0:
            raise MemtxError(f"{name} got {unit_sum.item():g} {self.unit}, expected a count of at least 0.")
        self.nll = self.nll + nll_sum
        self.units = self.units + unit_sum


class BitsPerByte(_NllPerUnit):
    """Negative log-likelihood in bits per byte of the raw text; comparable across tokenizers."""

    unit = "bytes"

    def compute(self) -> Tensor:
        """Return the bits per byte, ``()`` float64; NaN or inf without bytes."""
        return self.nll / self.units / math.log(2)


class BitsPerCharacter(BitsPerByte):
    """Negative log-likelihood in bits per character of the raw text."""

    unit = "characters"


class Perplexity(_NllPerUnit):
    """``exp(nll / tokens)``: the measure of benchmarks with a vocabulary of words, line ends included."""

    unit = "tokens"

    def compute(self) -> Tensor:
        """Return the perplexity, ``()`` float64; NaN without tokens."""
        return (self.nll / self.units).exp()


class WordPerplexity(_NllPerUnit):
    """``exp(nll / words of the raw text)``, PG-19's measure (Rae et al. 2019, section 4.1).

    NaN if it means nothing: above :data:`MAX_WORD_PERPLEXITY`, or by :func:`is_word_measure`.
    """

    unit = "words"
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sums("num_bytes", dtype=torch.int64)

    def update(self, nll: Tensor | float, units: Tensor | int, num_bytes: Tensor | int = 0) -> None:
        """Add a batch: its negative log-likelihood in nats, and the words and bytes of its raw text."""
        super().update(nll, units)
        self.num_bytes += torch.as_tensor(num_bytes, device=self.num_bytes.device).sum()

    def compute(self) -> Tensor:
        """Return the perplexity, ``()`` float64; NaN if it means nothing."""
        perplexity = (self.nll / self.units).exp()
        is_meaningful = perplexity <= MAX_WORD_PERPLEXITY and is_word_measure(int(self.units), int(self.num_bytes))
        return perplexity if is_meaningful else torch.full_like(perplexity, math.nan)


Span = tuple[str, int, int]
"""Type, first index and end index (exclusive)."""


class SpanF1(_SumMetric):
    """F1 of spans over all texts; a span is correct if its type and both ends are.

    With the spans of :func:`memtx.data.tasks.tagging.extract_spans` it is the micro average of CoNLL-2000's evaluation,
    as computed by the package seqeval.
    """

    higher_is_better = True

    true_positives: Tensor
    num_predictions: Tensor
    num_targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sums("true_positives", "num_predictions", "num_targets", dtype=torch.int64)

    def update(self, predictions: Sequence[Span], targets: Sequence[Span]) -> None:
        """Add the predicted and the true spans of one text."""
        self.true_positives += len(set(predictions) & set(targets))
        self.num_predictions += len(set(predictions))
        self.num_targets += len(set(targets))

    def compute(self) -> Tensor:
        """Return F1, ``()`` float32; 0 if no span is correct."""
        return (2 * self.true_positives / (self.num_predictions + self.num_targets).clamp(min=1)).float()


class ClassReport(Metric):
    """Precision, recall and F1 of each class, and how often each true class was predicted as each class.

    Args:
        classes: Names of the classes that are scored: labels, or types of spans.
        confusion_classes: Names of the classes of the confusion matrix; none for no matrix.
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor
    confusion: Tensor

    def __init__(self, classes: Sequence[str], confusion_classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.classes, self.confusion_classes = tuple(classes), tuple(confusion_classes)
        size = len(self.confusion_classes)
        # true positives, predictions and targets of each class
        self.add_state("counts", torch.zeros(3, len(self.classes), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, predictions: Collection[tuple[str, *tuple[int, ...]]], targets: Collection[tuple[str, *tuple[int, ...]]]
    ) -> None:
        """Add predicted and true items of one example: tuples that begin with their class, such as spans."""
        predicted, true = set(predictions), set(targets)
        for line, items in enumerate((predicted & true, predicted, true)):
            for name, *_ in items:
                self.counts[line, self.classes.index(name)] += 1

    def update_confusion(self, predictions: Sequence[str], targets: Sequence[str]) -> None:
        """Add the predicted and the true class of each item of one example."""
        for prediction, target in zip(predictions, targets, strict=True):
            line, column = self.confusion_classes.index(target), self.confusion_classes.index(prediction)
            self.confusion[line, column] += 1

    def compute(self) -> dict[str, Any]:
        """Return ``classes`` (precision, recall, f1 and support by name), and ``confusion`` with its matrix, if any."""
        true_positives, num_predictions, num_targets = self.counts.double()
        values = {
            "precision": true_positives / num_predictions.clamp(min=1),
            "recall": true_positives / num_targets.clamp(min=1),
            "f1": 2 * true_positives / (num_predictions + num_targets).clamp(min=1),
            "support": self.counts[2],
        }
        columns = {name: column.tolist() for name, column in values.items()}
        classes = {
            label: {name: column[index] for name, column in columns.items()} for index, label in enumerate(self.classes)
        }
        confusion = {"labels": list(self.confusion_classes), "matrix": self.confusion.tolist()}
        return {"classes": classes} | ({"confusion": confusion} if self.confusion_classes else {})


class RetrievalScore(Metric):
    """Score of the rank of each query's document among all documents: mean reciprocal rank, or recall at k.

    Every document counts once, and other right documents of the same query are left out. A document with the same
    cosine ranks before the right one, so that equal vectors score as badly as they are.

    Args:
        k: Ranks that count as found. None for the mean reciprocal rank.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    query_vectors: list[Tensor]
    query_ids: list[Tensor]
    target_ids: list[Tensor]
    document_vectors: list[Tensor]
    document_ids: list[Tensor]

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k = k
        for name in ("query_vectors", "query_ids", "target_ids", "document_vectors", "document_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        query_vectors: Tensor,
        query_ids: Tensor,
        target_ids: Tensor,
        document_vectors: Tensor,
        document_ids: Tensor,
    ) -> None:
        """Add queries and documents: vectors of unit length, ``(n, dim)``, and ids, ``(n,)``, equal for equal texts."""
        self.query_vectors.append(query_vectors)
        self.query_ids.append(query_ids)
        self.target_ids.append(target_ids)
        self.document_vectors.append(document_vectors)
        self.document_ids.append(document_ids)

    def compute(self) -> Tensor:
        """Return the mean over queries, ``()`` float32."""
        query_vectors, query_ids, target_ids, vectors, ids = (
            _concatenate(getattr(self, name)) for name in self._defaults
        )
        document_ids, inverse = torch.unique(ids, return_inverse=True)
        first = torch.full_like(document_ids, len(ids)).scatter_reduce(
            0, inverse, torch.arange(len(ids), device=ids.device), "amin"
        )
        documents = vectors[first].float()
        targets = torch.searchsorted(document_ids, target_ids)
        total = torch.zeros((), device=ids.device)
        for indices in torch.split(torch.arange(len(query_ids), device=ids.device), 1024):
            scores = query_vectors[indices].float() @ documents.T
            target_scores = scores.gather(1, targets[indices, None])
            pairs = query_ids[indices, None] == query_ids  # queries of the same text
            row, pair = pairs.nonzero(as_tuple=True)
            scores[row, targets[pair]] = -math.inf
            rank = 1 + (scores >= target_scores).sum(1)
            total += (1 / rank if self.k is None else (rank <= self.k).float()).sum()
        return total / len(query_ids)


def _concatenate(parts: Tensor | list[Tensor]) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)  # a tensor after a reduction


class _AnswerScore(_SumMetric, ABC):
    """Mean over questions of the best score against any true answer."""

    higher_is_better = True

    total_score: Tensor
    num_questions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._add_sums("total_score", dtype=torch.float64)
        self._add_sums("num_questions", dtype=torch.int64)

    def update(self, prediction: str, targets: Sequence[str]) -> None:
        """Add the predicted answer of a question (empty for none) and its true answers (an empty list for none)."""
        # Answers that normalize to nothing, such as "the", count only if there are no others (SQuAD 2.0's evaluation).
        answers = [answer for target in targets if (answer := normalize_answer(target))] or [""]
        self.total_score += max(self.score(normalize_answer(prediction), answer) for answer in answers)
        self.num_questions += 1

    @staticmethod
    @abstractmethod
    def score(prediction: str, target: str) -> float:
        """Return the score of one normalized answer against another."""

    def compute(self) -> Tensor:
        """Return the mean, ``()`` float32; NaN without questions."""
        return (self.total_score / self.num_questions).float()


class AnswerExactMatch(_AnswerScore):
    """Fraction of questions answered word for word (Rajpurkar et al. 2016, section 6.1)."""

    @staticmethod
    def score(prediction: str, target: str) -> float:
        """Return 1 for equal answers, else 0."""
        return float(prediction == target)


class AnswerF1(_AnswerScore):
    """F1 of the words in an answer (Rajpurkar et al. 2016, section 6.1); 1 if both answers are empty, 0 if one is."""

    @staticmethod
    def score(prediction: str, target: str) -> float:
        """Return the F1 of the bags of words."""
        words, target_words = prediction.split(), target.split()
        if not words or not target_words:
            return float(words == target_words)
        return 2 * sum((Counter(words) & Counter(target_words)).values()) / (len(words) + len(target_words))


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without punctuation, articles and repeated spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
