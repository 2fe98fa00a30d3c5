"""What language modelling is measured by in validation and test: loss, bits per byte, word perplexity."""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import Batch
from memtx.metrics import BitsPerByte, WordPerplexity


class LanguageMeasures(nn.ModuleDict):
    """The measures of both stages, each under ``stage_name``."""

    def __init__(self) -> None:
        kinds: dict[str, type[Metric]] = {
            "bits_per_byte": BitsPerByte,
            "word_perplexity": WordPerplexity,
            "loss": MeanMetric,
        }
        super().__init__({f"{stage}_{name}": kind() for stage in ("val", "test") for name, kind in kinds.items()})
        for stage in ("val", "test"):
            # A float32 sum stops growing after some ten million tokens.
            self._of(stage, "loss").set_dtype(torch.float64)

    def _of(self, stage: str, name: str) -> Metric:
        return cast(Metric, self[f"{stage}_{name}"])

    def count(self, module: pl.LightningModule, stage: str, batch: Batch, nats: Tensor, scored: Tensor) -> None:
        """Add a batch, and log.

        Args:
            module: that logs.
            stage: "val" or "test".
            batch: what was read.
            nats: () float64, the sum over scored labels.
            scored: (), how many there are.
        """
        for name, amount in (("bits_per_byte", batch.bytes), ("word_perplexity", batch.words)):
            self._of(stage, name).update(nats, amount.sum())
        self._of(stage, "loss").update(nats / scored.clamp(min=1), scored)
        # On every rank whatever it has scored: a rank that logged nothing would leave the others waiting for it.
        for name in ("bits_per_byte", "word_perplexity", "loss"):
            metric, rows = self._of(stage, name), batch.tokens.shape[0]
            shown = name != "loss"
            module.log(f"{stage}_{name}", metric, prog_bar=shown, on_step=False, on_epoch=True, batch_size=rows)
