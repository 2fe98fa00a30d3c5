"""Torchmetrics that the library of that name lacks: bits per byte, PG-19's word perplexity, SQuAD's and CoNLL's scores.

The first two count in float64 and divide once, at the end: a mean of per-batch means would weigh a short batch as
much as a long one, and a float32 sum stops growing after some ten million tokens.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from memtx.errors import MemtxError


class _NllPerUnit(Metric):
    """Sum of negative log-likelihood over a sum of units of the raw text."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    unit = "units"

    nll: Tensor
    units: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("units", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> _NllPerUnit:
        """Keep the sums in float64 whatever precision the model runs in."""
        return self

    def _apply(self, fn: object, *arguments: object, **options: object) -> _NllPerUnit:
        # Module.half() and the like reach states through _apply; only the device may follow the model.
        nll, units = self.nll, self.units
        super()._apply(fn, *arguments, **options)  # type: ignore[arg-type]
        self.nll, self.units = nll.to(self.nll.device), units.to(self.units.device)
        return self

    def update(self, nll: Tensor | float, units: Tensor | int) -> None:
        """Add what a batch measured.

        Args:
            nll: negative log-likelihood in nats; a sum, or a tensor of any shape that is summed here.
            units: bytes (or words) of the raw text that these tokens stand for; likewise.

        Raises:
            MemtxError: a likelihood that is not finite, or negative units.
        """
        nll_sum = torch.as_tensor(nll, dtype=torch.float64, device=self.nll.device).detach().sum()
        unit_sum = torch.as_tensor(units, dtype=torch.float64, device=self.units.device).detach().sum()
        if not math.isfinite(nll_sum.item()):
            raise MemtxError(
                f"{type(self).__name__} got a negative log-likelihood of {nll_sum.item()}, expected a finite one.",
                "The loss diverged: lower the learning rate or clip the gradient.",
            )
        if not unit_sum.item() >= 0:
            raise MemtxError(
                f"{type(self).__name__} got {unit_sum.item():g} {self.unit}, expected a count of at least 0."
            )
        self.nll = self.nll + nll_sum
        self.units = self.units + unit_sum

    def _nats_per_unit(self) -> Tensor:
        # 0 / 0 is NaN: a text without a word has no word perplexity, which is no reason to stop a run.
        return self.nll / self.units


class BitsPerByte(_NllPerUnit):
    """Total negative log-likelihood in bits, per byte of the raw text; comparable across tokenizers."""

    unit = "bytes"

    def compute(self) -> Tensor:
        """Return the bits per byte, () float64; NaN if no byte was counted."""
        return self._nats_per_unit() / math.log(2)


class WordPerplexity(_NllPerUnit):
    """``exp(total nll / words of the raw text)``, PG-19's measure (Rae et al. 2019, section 4.1)."""

    unit = "words"

    def compute(self) -> Tensor:
        """Return the perplexity, () float64; inf where the exponential overflows, NaN or inf if no word was counted."""
        return self._nats_per_unit().exp()


Span = tuple[str, int, int]
"""Type, first place, place behind the last."""


class SpanF1(Metric):
    """F1 of whole spans, over all texts together: right is a span of the same type and the same two ends.

    With the spans of :func:`memtx.data.tasks.tagging.extract_spans` it is the micro average of CoNLL-2000's
    evaluation, as the package seqeval has it.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    true_positives: Tensor
    num_predictions: Tensor
    num_targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("true_positives", "num_predictions", "num_targets"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Span], targets: Sequence[Span]) -> None:
        """Add one text's spans: those a model gives, and the true ones."""
        self.true_positives += len(set(predictions) & set(targets))
        self.num_predictions += len(set(predictions))
        self.num_targets += len(set(targets))

    def compute(self) -> Tensor:
        """Return F1, () float32; 0 where nothing is right."""
        return (2 * self.true_positives / (self.num_predictions + self.num_targets).clamp(min=1)).float()


class _AnswerScore(Metric):
    """The mean over questions of the best score against any true answer."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total_score: Tensor
    num_questions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total_score", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_questions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: str, targets: Sequence[str]) -> None:
        """Add one question: the answer given (empty for none), and the true ones (empty where there is none)."""
        # An answer that normalises to nothing, such as "the", does not count among several (SQuAD 2.0's evaluation).
        true = [one for one in targets if normalize_answer(one)] or [""]
        self.total_score += max(self.score(normalize_answer(prediction), normalize_answer(one)) for one in true)
        self.num_questions += 1

    @staticmethod
    def score(prediction: str, target: str) -> float:
        """Return the score of one normalised answer against another."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the mean, () float32; NaN if there was no question."""
        return (self.total_score / self.num_questions).float()


class AnswerExactMatch(_AnswerScore):
    """The share of questions answered word for word (Rajpurkar et al. 2016, section 6.1)."""

    @staticmethod
    def score(prediction: str, target: str) -> float:
        """Return 1 for equal answers."""
        return float(prediction == target)


class AnswerF1(_AnswerScore):
    """F1 of the words that answers share (Rajpurkar et al. 2016, section 6.1); of no answer, 1 if none is given."""

    @staticmethod
    def score(prediction: str, target: str) -> float:
        """Return the F1 of the bags of words."""
        own, true = prediction.split(), target.split()
        if not own or not true:
            return float(own == true)
        shared = sum((Counter(own) & Counter(true)).values())
        return 2 * shared / (len(own) + len(true))


def normalize_answer(text: str) -> str:
    """Return an answer in lower case without punctuation, articles and extra spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
