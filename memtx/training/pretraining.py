"""Pretraining on streams of text: masked, permuted and causal, for models that read a row at once and carry nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import IGNORED, Batch
from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.permuted import PermutedEncoder
from memtx.models.reformer import Reformer
from memtx.training import objectives
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.reading import shown_masked
from memtx.training.measures import LanguageMeasures
from memtx.training.optimizers import WarmupCosine
from memtx.training.trained import TrainedModule

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

SEED = 20_000
"""Of what is hidden in evaluation: the same at every validation, of every run."""


def lost(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of scores (n, vocab) against labels (n,), in nats; 0 where there are none."""
    return F.cross_entropy(scores.float(), labels, reduction="sum") / max(1, len(labels))


class GuessingModule(TrainedModule):
    """Trains a model to guess tokens of rows of text, and measures how often it is right.

    Args:
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
        distillation: see :class:`MaskedModule`.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        kinds = ("loss", "accuracy")
        self.metrics = nn.ModuleDict({f"{stage}_{kind}": MeanMetric() for stage in ("val", "test") for kind in kinds})

    @abstractmethod
    def guess(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return scores (n, vocab) and labels (n,) of what is to be guessed of a batch; generator draws what."""

    def begin(self) -> int:
        """Return the id that begins a document, which is never guessed."""
        data = getattr(self.trainer, "datamodule", None)
        return int(data.tokenizer.begin) if data is not None else -1

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the mean loss of what is guessed; 0 where nothing is."""
        scores, labels = self.guess(batch, None)
        return self._learned(lost(scores, labels), batch.tokens)

    def _measure(self, stage: str, batch: Batch, index: int) -> None:
        generator = torch.Generator(batch.tokens.device).manual_seed(SEED + index)
        scores, labels = self.guess(batch, generator)
        count = max(1, len(labels))
        figures = {
            "loss": lost(scores, labels),
            "accuracy": (scores.argmax(-1) == labels).sum() / count,
        }
        for name, value in figures.items():
            metric = cast(Metric, self.metrics[f"{stage}_{name}"])
            metric.update(value, len(labels))
            self.log(f"{stage}_{name}", metric, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))

    def validation_step(self, batch: Batch, index: int) -> None:
        """Measure a batch."""
        self._measure("val", batch, index)

    def test_step(self, batch: Batch, index: int) -> None:
        """Measure a batch."""
        self._measure("test", batch, index)


class MaskedModule(GuessingModule):
    """Masked language modelling (BERT, Devlin et al. 2019, section 3.1; Longformer and Big Bird as well).

    Args:
        model: makes the encoder from the vocabulary's size.
        vocab_size: of the tokenizer; flows from the data.
        mask_token: the id of a hidden token, where the vocabulary has one; None for a new one behind its last.
        share: of tokens, or words, that are guessed.
        whole_words: whether all tokens of a word are hidden together.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
        distillation: a teacher and what of it the model is to learn beside, or instead of, the labels; None for none.
    """

    model: Encoder

    def __init__(
        self,
        model: Callable[[int], Encoder] = Encoder,
        vocab_size: int = 257,
        mask_token: int | None = None,
        share: float = 0.15,
        whole_words: bool = False,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        self.drawn = vocab_size
        self.mask_token = vocab_size if mask_token is None else mask_token
        self.model = model(vocab_size + (mask_token is None))
        self.share, self.whole_words = share, whole_words
        self._edges: objectives.WordEdges | None = None

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one, and look up where words begin, if that matters."""
        if self.distillation is not None and self.distillation.caches:
            raise MemtxError(
                "Other tokens are hidden in each pass, so a teacher's scores of the last one are of no use.",
                "Leave the distillation's cache out.",
            )
        super().setup(stage)
        if self.whole_words and self._edges is None:
            tokenizer = cast(Any, self.trainer).datamodule.tokenizer
            self._edges = objectives.word_edges(tokenizer)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the mean loss of what is guessed, or the distillation's losses."""
        if self.distillation is None:
            return super().training_step(batch, index)
        found = self._hidden(batch, None)
        scored, keep = found.labels != IGNORED, self.distillation.needs_hidden(self.done)
        teacher = self.distillation.teacher(batch.tokens.device, self.model, batch.tokens.shape[1])
        heard = self.distillation.heard(lambda: shown_masked(cast(Encoder, teacher), found.tokens, scored, keep=keep))
        student = shown_masked(self.model, found.tokens, scored, keep=keep)
        assert student.states is not None
        loss = lost(student.states, found.labels[scored])
        return self._learned(self._compared(replace(student, loss=loss), heard), batch.tokens)

    def guess(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Hide some tokens and read the rest."""
        found = self._hidden(batch, generator)
        scored = found.labels != IGNORED
        logits = self.model(found.tokens, scored=scored).logits
        assert logits is not None
        return logits, found.labels[scored]

    def _hidden(self, batch: Batch, generator: torch.Generator | None) -> objectives.Masked:
        edges = self._edges
        if edges is not None and edges.goes_on.device != batch.tokens.device:
            edges = self._edges = objectives.WordEdges(*(part.to(batch.tokens.device) for part in edges))
        return objectives.masked(
            batch.tokens,
            mask=self.mask_token,
            vocab_size=self.drawn,
            share=self.share,
            kept=(self.begin(),),
            edges=edges,
            generator=generator,
        )


class PermutedModule(GuessingModule):
    """Permuted language modelling (XLNet, Yang et al. 2019).

    Args:
        model: makes the encoder from the vocabulary's size.
        vocab_size: of the tokenizer; flows from the data.
        share: of places that are guessed.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
    """

    model: PermutedEncoder

    def __init__(
        self,
        model: Callable[[int], PermutedEncoder] = PermutedEncoder,
        vocab_size: int = 257,
        share: float = 1 / 6,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = WarmupCosine,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.model = model(vocab_size)
        self.share = share

    def guess(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw an order and guess what comes last in it."""
        found = objectives.permuted(batch.tokens, share=self.share, kept=(self.begin(),), generator=generator)
        scored = found.labels != IGNORED
        logits = self.model(batch.tokens, rank=found.rank, scored=scored).logits
        assert logits is not None
        return logits, found.labels[scored]


class CausalModule(TrainedModule):
    """Causal language modelling of a model that carries nothing from row to row (Reformer, Kitaev et al. 2020).

    What carries a memory is trained by :class:`memtx.training.language.LanguageModule`.

    Args:
        model: makes the decoder from the vocabulary's size.
        vocab_size: of the tokenizer; flows from the data.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
    """

    model: Reformer

    def __init__(
        self,
        model: Callable[[int], Reformer] = Reformer,
        vocab_size: int = 257,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = WarmupCosine,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.model = model(vocab_size)
        self.metrics = LanguageMeasures()

    def _nll(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of every scored label, (n,) nats."""
        scored = batch.labels != IGNORED
        logits = self.model(batch.tokens).logits
        assert logits is not None
        return F.cross_entropy(logits[scored].float(), batch.labels[scored], reduction="none")

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the mean loss."""
        nll = self._nll(batch)
        loss = nll.sum() / max(1, len(nll))
        return self._learned(loss, batch.tokens)

    def _measure(self, stage: str, batch: Batch) -> None:
        nll = self._nll(batch).double()
        self.metrics.count(self, stage, batch, nll.sum(), torch.tensor(len(nll), device=nll.device))

    def validation_step(self, batch: Batch, index: int) -> None:
        """Measure a batch."""
        self._measure("val", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        """Measure a batch."""
        self._measure("test", batch)
