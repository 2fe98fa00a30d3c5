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

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.reformer import Reformer
from memtx.models.xlnet import XLNet
from memtx.training import objectives
from memtx.training.base_module import BaseModule
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.reading import forward_masked_lm
from memtx.training.metrics import LanguageMetrics
from memtx.training.optimizers import WarmupCosine

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

EVAL_SEED = 20_000
"""Of what is hidden in evaluation: the same at every validation, of every run."""


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of scores (n, vocab) against labels (n,), in nats; 0 where there are none."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))


class TokenPredictionModule(BaseModule):
    """Trains a model to guess tokens of rows of text, and measures how often it is right.

    Args:
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
        distillation: see :class:`MaskedModule`.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        kinds = ("loss", "accuracy")
        self.metrics = nn.ModuleDict({f"{stage}_{kind}": MeanMetric() for stage in ("val", "test") for kind in kinds})

    @abstractmethod
    def predict_tokens(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return scores (n, vocab) and labels (n,) of what is to be guessed of a batch; generator draws what."""

    def bos_token_id(self) -> int:
        """Return the id that begins a document, which is never guessed."""
        data = getattr(self.trainer, "datamodule", None)
        return int(data.tokenizer.bos_token_id) if data is not None else -1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of what is guessed; 0 where nothing is."""
        scores, labels = self.predict_tokens(batch, None)
        return self._log_training_step(mean_cross_entropy(scores, labels), batch.tokens)

    def _evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        generator = torch.Generator(batch.tokens.device).manual_seed(EVAL_SEED + batch_idx)
        scores, labels = self.predict_tokens(batch, generator)
        count = max(1, len(labels))
        figures = {
            "loss": mean_cross_entropy(scores, labels),
            "accuracy": (scores.argmax(-1) == labels).sum() / count,
        }
        for name, value in figures.items():
            metric = cast(Metric, self.metrics[f"{stage}_{name}"])
            metric.update(value, len(labels))
            self.log(f"{stage}_{name}", metric, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("test", batch, batch_idx)


class MaskedModule(TokenPredictionModule):
    """Masked language modelling (BERT, Devlin et al. 2019, section 3.1; Longformer and Big Bird as well).

    Args:
        model: makes the encoder from the vocabulary's size.
        vocab_size: of the tokenizer; flows from the data.
        mask_id: the id of a hidden token, where the vocabulary has one; None for a new one behind its last.
        mask_prob: of tokens, or words, that are guessed.
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
        mask_id: int | None = None,
        mask_prob: float = 0.15,
        whole_words: bool = False,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = WarmupCosine,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        self.data_vocab_size = vocab_size
        self.mask_id = vocab_size if mask_id is None else mask_id
        self.model = model(vocab_size + (mask_id is None))
        self.mask_prob, self.whole_words = mask_prob, whole_words
        self._word_boundaries: objectives.WordBoundaries | None = None

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one, and look up where words begin, if that matters."""
        if self.distillation is not None and self.distillation.uses_cache:
            raise MemtxError(
                "Other tokens are hidden in each pass, so a teacher's scores of the last one are of no use.",
                "Leave the distillation's cache_dir out.",
            )
        super().setup(stage)
        if self.whole_words and self._word_boundaries is None:
            tokenizer = cast(Any, self.trainer).datamodule.tokenizer
            self._word_boundaries = objectives.find_word_boundaries(tokenizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of what is guessed, or the distillation's losses."""
        if self.distillation is None:
            return super().training_step(batch, batch_idx)
        found = self._mask_batch(batch, None)
        scored, keep = found.labels != IGNORE_INDEX, self.distillation.needs_hidden_states(self.progress)
        teacher = self.distillation.get_teacher(batch.tokens.device, self.model, batch.tokens.shape[1])
        heard = self.distillation.get_teacher_outputs(
            lambda: forward_masked_lm(cast(Encoder, teacher), found.tokens, scored, output_hidden_states=keep)
        )
        student = forward_masked_lm(self.model, found.tokens, scored, output_hidden_states=keep)
        assert student.features is not None
        loss = mean_cross_entropy(student.features, found.labels[scored])
        return self._log_training_step(self._distillation_loss(replace(student, loss=loss), heard), batch.tokens)

    def predict_tokens(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Hide some tokens and read the rest."""
        found = self._mask_batch(batch, generator)
        scored = found.labels != IGNORE_INDEX
        logits = self.model(found.tokens, logits_mask=scored).logits
        assert logits is not None
        return logits, found.labels[scored]

    def _mask_batch(self, batch: Batch, generator: torch.Generator | None) -> objectives.MaskedTokens:
        edges = self._word_boundaries
        if edges is not None and edges.continues_word.device != batch.tokens.device:
            edges = self._word_boundaries = objectives.WordBoundaries(*(part.to(batch.tokens.device) for part in edges))
        return objectives.mask_tokens(
            batch.tokens,
            mask_token_id=self.mask_id,
            vocab_size=self.data_vocab_size,
            mask_prob=self.mask_prob,
            special_token_ids=(self.bos_token_id(),),
            word_boundaries=edges,
            generator=generator,
        )


class PermutedModule(TokenPredictionModule):
    """Permuted language modelling (XLNet, Yang et al. 2019).

    Args:
        model: makes the encoder from the vocabulary's size.
        vocab_size: of the tokenizer; flows from the data.
        predict_fraction: of places that are guessed.
        optimizer: makes the optimiser from parameter groups.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step.
    """

    model: XLNet

    def __init__(
        self,
        model: Callable[[int], XLNet] = XLNet,
        vocab_size: int = 257,
        predict_fraction: float = 1 / 6,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = WarmupCosine,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.model = model(vocab_size)
        self.predict_fraction = predict_fraction

    def predict_tokens(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw an order and guess what comes last in it."""
        found = objectives.sample_permutation(
            batch.tokens,
            predict_fraction=self.predict_fraction,
            special_token_ids=(self.bos_token_id(),),
            generator=generator,
        )
        scored = found.labels != IGNORE_INDEX
        logits = self.model(batch.tokens, permutation_rank=found.rank, logits_mask=scored).logits
        assert logits is not None
        return logits, found.labels[scored]


class CausalModule(BaseModule):
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
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = WarmupCosine,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.model = model(vocab_size)
        self.metrics = LanguageMetrics()

    def _nll(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of every scored label, (n,) nats."""
        scored = batch.labels != IGNORE_INDEX
        logits = self.model(batch.tokens).logits
        assert logits is not None
        return F.cross_entropy(logits[scored].float(), batch.labels[scored], reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        nll = self._nll(batch)
        loss = nll.sum() / max(1, len(nll))
        return self._log_training_step(loss, batch.tokens)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        nll = self._nll(batch).double()
        self.metrics.update_and_log(self, stage, batch, nll.sum(), torch.tensor(len(nll), device=nll.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("test", batch)
