"""How often the likeliest token is the label, for tasks that ask little: no logits are kept while training."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch
from torchmetrics.classification import MulticlassAccuracy

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.training.language import LanguageModule


class TokenAccuracy(pl.Callback):
    """Logs ``val_accuracy`` and ``test_accuracy``, the share of labels that are the likeliest token.

    Every batch is read once more for its logits, and each of them must begin with documents, as episodes do.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MulticlassAccuracy] = {}

    def _update(self, stage: str, module: Any, batch: Batch) -> None:
        language = cast(LanguageModule, module)
        if stage not in self._metrics:
            kind = MulticlassAccuracy(language.model.vocab_size, average="micro", ignore_index=IGNORE_INDEX)
            self._metrics[stage] = kind.to(language.device)
        metric = self._metrics[stage]
        state = language.model.init_state(batch.tokens.shape[0])
        with torch.no_grad():
            for at in range(0, batch.tokens.shape[1], language.segment_length):
                part = slice(at, at + language.segment_length)
                said = language.model(batch.tokens[:, part], state, document_starts=batch.document_starts[:, part])
                state = said.state
                metric.update(said.logits.argmax(-1), batch.labels[:, part])

    def _log(self, stage: str, module: pl.LightningModule) -> None:
        if (metric := self._metrics.pop(stage, None)) is not None:
            module.log(f"{stage}_accuracy", metric.compute(), prog_bar=True)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch's answers."""
        self._update("val", pl_module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log their share."""
        self._log("val", pl_module)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch's answers."""
        self._update("test", pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log their share."""
        self._log("test", pl_module)
