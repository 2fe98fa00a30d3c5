"""What language modelling is measured by in validation and test: loss, bits per byte, word perplexity."""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from memtx.data.batch import Batch
from memtx.metrics import BitsPerByte, WordPerplexity


class LanguageMetrics(nn.ModuleDict):
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
            self._get_metric(stage, "loss").set_dtype(torch.float64)

    def _get_metric(self, stage: str, name: str) -> Metric:
        return cast(Metric, self[f"{stage}_{name}"])

    def update_and_log(
        self, module: pl.LightningModule, stage: str, batch: Batch, nll_sum: Tensor, num_scored: Tensor
    ) -> None:
        """Add a batch, and log.

        Args:
            module: that logs.
            stage: "val" or "test".
            batch: what was read.
            nll_sum: () float64, the sum over scored labels.
            num_scored: (), how many there are.
        """
        for name, amount in (("bits_per_byte", batch.num_bytes), ("word_perplexity", batch.num_words)):
            self._get_metric(stage, name).update(nll_sum, amount.sum())
        self._get_metric(stage, "loss").update(nll_sum / num_scored.clamp(min=1), num_scored)
        # On every rank whatever it has scored: a rank that logged nothing would leave the others waiting for it.
        for name in ("bits_per_byte", "word_perplexity", "loss"):
            metric, rows = self._get_metric(stage, name), batch.tokens.shape[0]
            shown = name != "loss"
            module.log(f"{stage}_{name}", metric, prog_bar=shown, on_step=False, on_epoch=True, batch_size=rows)
