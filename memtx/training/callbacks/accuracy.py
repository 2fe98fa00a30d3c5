"""Accuracy of predicted tokens, for synthetic tasks; training computes no logits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.training.language import LanguageModule


class TokenAccuracy(pl.Callback):
    """Logs ``val_accuracy`` and ``test_accuracy``, the fraction of labels that are the most likely token.

    Reads every batch once more for its logits. Batches must begin with documents, as those of synthetic tasks do.
    """

    @torch.no_grad()
    def _log(self, stage: str, module: pl.LightningModule, batch: Batch) -> None:
        assert isinstance(module, LanguageModule)
        state = module.model.init_state(batch.tokens.shape[0])
        num_correct = torch.zeros((), dtype=torch.int64, device=module.device)
        for start in range(0, batch.tokens.shape[1], module.segment_length):
            part = slice(start, start + module.segment_length)
            output = module.model(batch.tokens[:, part], state, document_starts=batch.document_starts[:, part])
            state = output.state
            num_correct += (output.logits.argmax(-1) == batch.labels[:, part]).sum()
        num_scored = int((batch.labels != IGNORE_INDEX).sum())
        accuracy = num_correct / max(1, num_scored)
        module.log(f"{stage}_accuracy", accuracy, prog_bar=True, on_epoch=True, batch_size=num_scored, sync_dist=True)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log the accuracy of a validation batch; Lightning takes the mean over labels."""
        self._log("val", pl_module, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log the accuracy of a test batch."""
        self._log("test", pl_module, batch)
