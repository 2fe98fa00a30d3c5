"""Training on streams of vectors: speech frames, sensor series, observations of agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from memtx.data.batch import SequenceBatch
from memtx.errors import MemtxError
from memtx.models.sequence_model import SequenceModel
from memtx.models.sources import hide_sources, list_sources
from memtx.training.recurrent_module import RecurrentModule
from memtx.training.tbptt import find_scored

WITHOUT_MEMORY = "val without memory"
"""Stage of the readings without memory."""


class SequenceModule(RecurrentModule):
    """Trains a sequence model on streams of vectors, :class:`memtx.data.batch.SequenceBatch`.

    Gradients flow through all segments of a batch and the memory between them; then the state is detached and carried
    to the next batch. Each stream is reset where an episode or a series begins, also within a batch. Logs the head's
    loss (``val_loss``), the mean squared and absolute error of the expected vectors (``val_mse``, ``val_mae``), and
    ``val_memory_gain``, the loss without the memories minus the loss with them.

    Args:
        model: Creates the model from input_dim and output_dim.
        input_dim: Width of the input vectors; set from the data module.
        output_dim: Width of the predicted vectors; set from the data module.
        segment_length: Steps per call; set from the data module.
        compile: If True, run the model through ``torch.compile``.
        compile_mode: Mode of ``torch.compile``.
        activation_checkpointing: If True, recompute each layer in the backward pass.
        measure_memory_gain: If True, validation reads the series again without the memories, one more pass.
        replay: If True, recompute each segment in the backward pass and store only the states between segments.
        state_reset_prob: Probability that a stream starts a step with a fresh state. None means 0.05 if a memory is
            ``unbounded``, else 0.
        **options: ``optimizer``, ``scheduler`` and ``gate_lr_multiplier`` of :class:`BaseModule`.

    Raises:
        MemtxError: A number is out of range, or ``distillation`` is given.
    """

    model: SequenceModel

    def __init__(
        self,
        model: Callable[[int, int], SequenceModel] = SequenceModel,
        input_dim: int = 1,
        output_dim: int = 1,
        segment_length: int = 128,
        *,
        compile: bool = False,
        compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        activation_checkpointing: bool = False,
        measure_memory_gain: bool = True,
        replay: bool = False,
        state_reset_prob: float | None = None,
        **options: Any,
    ) -> None:
        if options.get("distillation") is not None:
            raise MemtxError("distillation does not support models of vectors.", "Remove model.distillation.")
        super().__init__(
            model(input_dim, output_dim),
            segment_length,
            compile=compile,
            compile_mode=compile_mode,
            activation_checkpointing=activation_checkpointing,
            replay=replay,
            state_reset_prob=state_reset_prob,
            **options,
        )
        names = [f"{stage}_{name}" for stage in ("val", "test") for name in ("loss", "mse", "mae")]
        sources = list_sources(self.model) if measure_memory_gain else []
        self.sources = tuple(sources)
        self.metrics = nn.ModuleDict(
            {name: MeanMetric() for name in (*names, *(["val_memory_gain"] if sources else []))}
        )
        for metric in self.metrics.values():
            cast(MeanMetric, metric).set_dtype(torch.float64)  # a float32 sum stops growing after ten million steps

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        output = self._unroll("train", batch.inputs, batch, self._initial_state("train", batch, batch_idx))
        for name, value in output.losses.items():
            self.log(f"train_{name}", value)
        return self._log_training_step(output.loss, batch.tokens)

    @torch.no_grad()
    def evaluate_batch(self, stage: str, batch: SequenceBatch, batch_idx: int) -> None:
        """Update and log the metrics of a stage."""
        state = self._initial_state(stage, batch, batch_idx)
        is_scored, errors, losses = find_scored(batch.labels), [], []
        for start in range(0, batch.inputs.shape[1], self.segment_length):
            part = slice(start, start + self.segment_length)
            labels = batch.labels[:, part]
            output = self.model(
                batch.inputs[:, part], state, document_starts=batch.document_starts[:, part], labels=labels
            )
            state = output.state
            losses.append(output.nll)
            errors.append((self.model.mean(output.logits) - labels).double())
        self.carry.set_state(stage, state)
        loss, error = torch.cat(losses, dim=1)[is_scored].double(), torch.cat(errors, dim=1)
        error = error[~error.isnan()]
        self._log_mean(f"{stage}_loss", loss, batch)
        self._log_mean(f"{stage}_mse", error**2, batch)
        self._log_mean(f"{stage}_mae", error.abs(), batch)
        if stage == "val" and self.sources:
            with hide_sources(self.model, self.sources):
                state = self._initial_state(WITHOUT_MEMORY, batch, batch_idx)
                without = self._unroll(WITHOUT_MEMORY, batch.inputs, batch, state).nll
            self._log_mean("val_memory_gain", without[is_scored].double() - loss, batch)

    def _log_mean(self, name: str, values: Tensor, batch: SequenceBatch) -> None:
        """Add values to a metric and log it, on every rank, whatever it scored."""
        metric = cast(MeanMetric, self.metrics[name])
        if len(values):
            metric.update(values)
        show = name.endswith("_loss")
        batch_size = len(batch.inputs)
        self.log(name, metric, prog_bar=show, on_step=False, on_epoch=True, batch_size=batch_size)

    def on_validation_end(self) -> None:
        """Free the states of validation."""
        super().on_validation_end()
        self.carry.reset(WITHOUT_MEMORY)
