"""Masked and causal pretraining on text, for models without a state between batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.hf_tokenizers import HFTokenizer
from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder import Encoder
from memtx.models.reformer import Reformer
from memtx.training import objectives
from memtx.training.base_module import BaseModule
from memtx.training.distillation.model_outputs import forward_masked_lm
from memtx.training.initial_model import load_initial_model
from memtx.training.metrics import LanguageMetrics

EVAL_SEED = 20_000
"""Seed of the masks in evaluation, equal in every validation of every run."""


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss in nats of logits ``(n, vocab)`` against labels ``(n,)``; 0 if there are none."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))


class TokenPredictionModule(BaseModule):
    """Trains a model to predict selected tokens of a text; logs loss and accuracy.

    Args:
        **options: ``optimizer``, ``scheduler``, ``gate_lr_multiplier`` and ``distillation`` of :class:`BaseModule`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        names = [f"{stage}_{name}" for stage in ("val", "test") for name in ("loss", "accuracy")]
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in names})

    @abstractmethod
    def predict_tokens(
        self, stage: str, batch: Batch, batch_idx: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``(n, vocab)`` and labels ``(n,)`` of the selected tokens; the generator samples them."""

    def bos_token_id(self) -> int:
        """Return the id that begins a document, which is never selected; -1 if there is none."""
        bos_token_ids = self.datamodule.tokenizer.bos_token_ids if self.datamodule is not None else []
        return int(bos_token_ids[0]) if bos_token_ids else -1

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the selected tokens; 0 if there are none."""
        loss = mean_cross_entropy(*self.predict_tokens("train", batch, batch_idx, None))
        return self._log_training_step(loss, batch.tokens)

    def evaluate_batch(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Update and log loss and accuracy of a stage."""
        generator = torch.Generator(batch.tokens.device).manual_seed(EVAL_SEED + batch_idx)
        logits, labels = self.predict_tokens(stage, batch, batch_idx, generator)
        num_correct = (logits.argmax(-1) == labels).sum()
        values = {"loss": mean_cross_entropy(logits, labels), "accuracy": num_correct / max(1, len(labels))}
        for name, value in values.items():
            metric = cast(Metric, self.metrics[f"{stage}_{name}"])
            metric.update(value, len(labels))
            self.log(f"{stage}_{name}", metric, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))


def _load_masked_encoder(path: str, num_tokens: int) -> Encoder:
    encoder = load_initial_model(path, Encoder, "an encoder", num_tokens)
    if encoder.head is None:
        raise MemtxError(f"'{path}' has no head for masked tokens.", "Change model.pretrained.")
    return encoder


class MaskedModule(TokenPredictionModule):
    """Masked language modeling (BERT, Devlin et al. 2019, section 3.1; also Longformer and Big Bird).

    Args:
        model: Creates the encoder from the vocabulary size.
        vocab_size: Vocabulary size; set from the data module.
        mask_id: Id of the mask token. Defaults to ``mask_token_id``; without one it is added after the last id.
        mask_prob: Probability that a token or a word is selected. Defaults to 0.15.
        whole_words: If True, select all tokens of a word together.
        mask_spans: If True, select spans of whole words of geometric lengths, 3.8 words on average and at most 10
            (SpanBERT, Joshi et al. 2020, section 3.1), in training and validation. Defaults to False.
        mask_smoothing: Exponent s that favors rare tokens in training: one that occurs n times in the training texts
            is selected with a probability proportional to n^-s (0.7 for DistilBERT, Sanh et al. 2019). Validation
            selects all alike. Defaults to 0.0.
        add_special_tokens: If True, put ``[CLS]`` before and ``[SEP]`` after every sequence, and ``[SEP]`` between
            documents, as published encoders read texts; these are two tokens more than the data's ``segment_length``.
        mask_token_id: Id of the tokenizer's mask token, None if it has none; set from the data module.
        pretrained: Folder of an encoder with a head for masked tokens to begin with, such as one that
            ``memtx convert --to longformer`` wrote; ``model`` is then ignored.
        **options: ``optimizer``, ``scheduler``, ``gate_lr_multiplier`` and ``distillation`` of :class:`BaseModule`.
    """

    model: Encoder

    def __init__(
        self,
        model: Callable[[int], Encoder] = Encoder,
        vocab_size: int = 257,
        mask_id: int | None = None,
        mask_prob: float = 0.15,
        whole_words: bool = False,
        mask_smoothing: float = 0.0,
        add_special_tokens: bool = False,
        mask_token_id: int | None = None,
        pretrained: str | None = None,
        mask_spans: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(0, mask_smoothing=mask_smoothing)
        if (whole_words or mask_spans) and mask_smoothing:
            name = "mask_spans" if mask_spans else "whole_words"
            raise MemtxError(
                f"mask_smoothing ({mask_smoothing}) selects single tokens, {name} whole words.", "Set one of them."
            )
        self.data_vocab_size = vocab_size
        mask_id = mask_token_id if mask_id is None else mask_id
        self.mask_id = vocab_size if mask_id is None else mask_id
        num_tokens = vocab_size + (mask_id is None)
        self.model = model(num_tokens) if pretrained is None else _load_masked_encoder(pretrained, num_tokens)
        self.mask_prob, self.whole_words, self.mask_spans = mask_prob, whole_words or mask_spans, mask_spans
        self.mask_smoothing, self.add_special_tokens = mask_smoothing, add_special_tokens
        self._token_weights: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Count the tokens of the training texts if rare ones are favored, and load the teacher."""
        if self.add_special_tokens and not isinstance(getattr(self.datamodule, "tokenizer", None), HFTokenizer):
            raise MemtxError(
                "model.add_special_tokens needs a tokenizer with [CLS] and [SEP].",
                "Set data.tokenizer to an HFTokenizer or a WordPieceTokenizer, or add_special_tokens to false.",
            )
        if stage == "fit" and self.mask_smoothing:
            counts = np.zeros(self.data_vocab_size + 1, dtype=np.int64)
            counted = self.datamodule.token_store("train").count_tokens()
            counts[: len(counted)] = counted
            self._token_weights = torch.from_numpy(np.maximum(counts, 1).astype(np.float32) ** -self.mask_smoothing)
        if self.distillation is not None and self.distillation.uses_cache:
            raise MemtxError(
                "distillation.cache_dir caches the teacher's logits, but masks differ in every epoch.",
                "Remove cache_dir from model.distillation.",
            )
        super().setup(stage)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the masked tokens, or the distillation losses."""
        if self.distillation is None:
            return super().training_step(batch, batch_idx)
        masked = self._mask_batch(batch, None)
        scored = masked.labels != IGNORE_INDEX
        needs_hidden = self.distillation.needs_hidden_states(self.progress)
        teacher = cast(Encoder, self.distillation.get_teacher(batch.tokens.device, self.model, masked.tokens.shape[1]))
        teacher_outputs = self.distillation.get_teacher_outputs(
            lambda: forward_masked_lm(teacher, masked.tokens, scored, output_hidden_states=needs_hidden)
        )
        outputs = forward_masked_lm(self.model, masked.tokens, scored, output_hidden_states=needs_hidden)
        assert outputs.features is not None
        logits = self.model.predict_tokens(outputs.features[outputs.masked])
        outputs = replace(outputs, loss=mean_cross_entropy(logits, masked.labels[scored]))
        return self._log_training_step(self._distillation_loss(outputs, teacher_outputs), batch.tokens)

    def predict_tokens(
        self, stage: str, batch: Batch, batch_idx: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Mask some tokens and predict them."""
        masked = self._mask_batch(batch, generator)
        scored = masked.labels != IGNORE_INDEX
        logits = self.model(masked.tokens, logits_mask=scored).logits
        assert logits is not None
        return logits, masked.labels[scored]

    def _mask_batch(self, batch: Batch, generator: torch.Generator | None) -> objectives.MaskedTokens:
        tokens, word_ids, weights = self._frame(batch.tokens), None, None
        if self.whole_words:
            tokenizer = self.datamodule.tokenizer
            word_ids = torch.from_numpy(np.stack([tokenizer.word_ids(sequence) for sequence in tokens.tolist()]))
            word_ids = word_ids.to(tokens.device)
        if generator is None and self._token_weights is not None:
            weights = self._token_weights = self._token_weights.to(tokens.device)
        options: dict[str, Any] = {
            "mask_token_id": self.mask_id,
            "vocab_size": self.data_vocab_size,
            "mask_prob": self.mask_prob,
            "special_token_ids": self._special_token_ids(),
            "word_ids": word_ids,
            "generator": generator,
        }
        if self.mask_spans:
            return objectives.mask_geometric_spans(tokens, **options)
        return objectives.mask_tokens(tokens, token_weights=weights, **options)

    def _special_token_ids(self) -> tuple[int, ...]:
        """Return the ids that are never selected: the tokenizer's special tokens."""
        tokenizer = getattr(self.datamodule, "tokenizer", None)
        return tokenizer.special_token_ids if isinstance(tokenizer, HFTokenizer) else (self.bos_token_id(),)

    def _frame(self, tokens: Tensor) -> Tensor:
        """Return the tokens between ``[CLS]`` and ``[SEP]`` if ``add_special_tokens``."""
        if not self.add_special_tokens:
            return tokens
        tokenizer = self.datamodule.tokenizer
        first, last = (
            tokens.new_full((len(tokens), 1), id_) for id_ in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        )
        return torch.cat([first, tokens.where(tokens != tokenizer.cls_token_id, last), last], dim=1)


class CausalModule(BaseModule):
    """Causal language modeling without a state between batches (Reformer, Kitaev et al. 2020).

    :class:`memtx.training.language.LanguageModule` trains models with memory.

    Args:
        model: Creates the decoder from the vocabulary size.
        vocab_size: Vocabulary size; set from the data module.
        **options: ``optimizer`` and ``scheduler`` of :class:`BaseModule`.
    """

    model: Reformer

    def __init__(self, model: Callable[[int], Reformer] = Reformer, vocab_size: int = 257, **options: Any) -> None:
        super().__init__(distillation=None, **options)
        self.model = model(vocab_size)
        self.metrics = LanguageMetrics()

    def _nll(self, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of each scored label in nats, ``(n,)``."""
        scored = batch.labels != IGNORE_INDEX
        logits = self.model(batch.tokens).logits
        assert logits is not None
        return F.cross_entropy(logits[scored].float(), batch.labels[scored], reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        nll = self._nll(batch)
        return self._log_training_step(nll.sum() / max(1, len(nll)), batch.tokens)

    def evaluate_batch(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Update and log the metrics of a stage."""
        nll = self._nll(batch).double()
        self.metrics.update_and_log(self, stage, batch, nll.sum(), torch.tensor(len(nll), device=nll.device))

    def log_at_epoch_end(self, stage: str) -> None:
        """Log the word perplexity."""
        self.metrics.log_word_perplexity(self, stage)
