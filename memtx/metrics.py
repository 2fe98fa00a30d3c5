"""Metrics that torchmetrics lacks: bits per byte, PG-19's word perplexity, SQuAD's and CoNLL's scores.

The first two sum in float64 and divide once, at the end: a mean of batch means would weight short and long batches
equally, and a float32 sum stops growing after about ten million tokens.
"""

from __future__ import annotations

import math
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

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
