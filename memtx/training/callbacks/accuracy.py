"""Accuracy of predicted tokens, for synthetic tasks; training computes no logits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics.classification import MulticlassAccuracy

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.training.language import LanguageModule


class TokenAccuracy(pl.Callback):
    """Logs ``val_accuracy`` and ``test_accuracy``, the fraction of labels that are the most likely token.

    Reads every batch once more for its logits. Batches must begin with documents, as those of synthetic tasks do.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MulticlassAccuracy] = {}

    @torch.no_grad()
    def _update(self, stage: str, module: pl.LightningModule, batch: Batch) -> None:
        assert isinstance(module, LanguageModule)
        if stage not in self._metrics:
            metric = MulticlassAccuracy(module.model.vocab_size, average="micro", ignore_index=IGNORE_INDEX)
            self._metrics[stage] = metric.to(module.device)
        state = module.model.init_state(batch.tokens.shape[0])
        for start in range(0, batch.tokens.shape[1], module.segment_length):
            part = slice(start, start + module.segment_length)
            output = module.model(batch.tokens[:, part], state, document_starts=batch.document_starts[:, part])
            state = output.state
            self._metrics[stage].update(output.logits.argmax(-1), batch.labels[:, part])

    def _log(self, stage: str, module: pl.LightningModule) -> None:
        if (metric := self._metrics.pop(stage, None)) is not None:
            module.log(f"{stage}_accuracy", metric.compute(), prog_bar=True)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Add the predictions for a validation batch."""
        self._update("val", pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy of validation."""
        self._log("val", pl_module)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Add the predictions for a test batch."""
        self._update("test", pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy of testing."""
        self._log("test", pl_module)
