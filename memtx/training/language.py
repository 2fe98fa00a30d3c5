"""Language modeling with truncated back-propagation through time: the state is carried from batch to batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memtx.data.batch import Batch
from memtx.errors import MemtxError, check_at_least
from memtx.models.add_memory import Retrofit
from memtx.models.memory_length import memory_length
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.sources import list_sources
from memtx.state import MemoryState
from memtx.training.base_module import BaseModule
from memtx.training.carry import Carry, StateReset, restore_rank_state
from memtx.training.compression_rates import CompressionRateSampler
from memtx.training.distillation.language import TEACHER_STAGE, LanguageDistillation
from memtx.training.lora import LoRA, freeze_base_model
from memtx.training.metrics import LanguageMetrics, MemoryGain
from memtx.training.tbptt import UnrollOutput, unroll

_SAVED_STAGES = {"carry": "train", "teacher": TEACHER_STAGE}
"""Stages of the carry in a checkpoint, by key there."""


class LanguageModule(BaseModule):
    """Trains a recurrent language model on streams of documents.

    A batch holds ``bptt_segments`` segments of every stream. Gradients flow through all of them and the memory between
    them; then the state is detached and carried to the next batch. It is reset where a document begins.

    Args:
        model: Creates the model from the vocabulary size; ``Retrofit`` loads it from a folder.
        vocab_size: Vocabulary size; set from the data module.
        segment_length: Tokens per call; set from the data module.
        compile: If True, run the model through ``torch.compile``.
        compile_mode: Mode of ``torch.compile``; "max-autotune-no-cudagraphs" tries several kernels for each product.
        activation_checkpointing: If True, recompute each layer in the backward pass: about a third more time, and
            activations of a single layer.
        measure_memory_gain: If True, validation reads the texts again without the memories and logs the difference in
            bits per byte: without all but the exact window, ``val_memory_gain``, and the same by distance in tokens
            from the start of the document, ``val_memory_gain_N``; without one of several sources,
            ``val_memory_gain/SOURCE`` (see :func:`memtx.models.sources.list_sources`); and what the window carries from
            segment to segment, ``val_memory_gain/window``. Each is one more pass.
        replay: If True, recompute each segment in the backward pass and store only the states between segments: equal
            gradients, about a third more time, and memory that hardly grows with ``bptt_segments``.
        freeze_base: If True, train the memories alone and keep the model that they were added to.
        compression_rates: Compression rates to sample from, one per training step, each with fresh streams. If empty,
            the model keeps its own.
        lora: Low-rank matrices to train beside a frozen base. Checkpoints store them apart from the base; a loaded
            model has them merged. None disables LoRA.
        state_reset_prob: Probability that a stream starts a step with a fresh state in the middle of its document. None
            means 0.05 if a memory is ``unbounded``, else 0. Without resets, an unbounded memory keeps what it stored
            before its gates learned to close, and the model relies on it as on a bias that the next document loses.
        eval_memory: Hidden states carried per layer in validation and tests, as Transformer-XL is tested with a longer
            cache than it is trained with; see :func:`memtx.models.memory_length.set_memory_length`. None keeps the
            model's.
        clamp: Largest distance that a Transformer-XL tells apart in validation and tests. None keeps the model's.
        same_length: If True, every query sees equally many positions in validation and tests. None keeps the model's
            setting.
        **options: ``optimizer``, ``scheduler``, ``gate_lr_multiplier`` and ``distillation`` of :class:`BaseModule`.

    Raises:
        MemtxError: A number is out of range, nothing would be trained, or ``lora`` is given without ``freeze_base``.
    """

    model: MemoryTransformer
    carries_state: ClassVar[bool] = True
    """If False, every batch starts with fresh streams."""

    def __init__(
        self,
        model: Callable[[int], MemoryTransformer] | Retrofit = MemoryTransformer,
        vocab_size: int = 257,
        segment_length: int = 512,
        *,
        compile: bool = False,
        compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        activation_checkpointing: bool = False,
        measure_memory_gain: bool = True,
        replay: bool = False,
        freeze_base: bool = False,
        compression_rates: Sequence[int] = (),
        lora: LoRA | None = None,
        state_reset_prob: float | None = None,
        eval_memory: int | None = None,
        clamp: int | None = None,
        same_length: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(1, segment_length=segment_length)
        self.model = model(vocab_size)
        self.model.activation_checkpointing = activation_checkpointing
        self.rate_sampler = CompressionRateSampler(self.model, compression_rates)
        self.state_reset = StateReset(self.model, state_reset_prob)
        if freeze_base:
            freeze_base_model(self.model, lora)
        elif lora is not None:
            raise MemtxError("lora adapts a frozen base, but freeze_base is false.", "Set freeze_base, or remove lora.")
        self.segment_length, self.replay = segment_length, replay
        self._eval_settings = eval_memory, clamp, same_length
        with self._eval_context():  # raises for a model that it does not fit
            pass
        if compile:
            # In place, because a wrapper would duplicate every weight in the checkpoint.
            self.model.compile(dynamic=False, mode=compile_mode)
        self.carry = Carry()
        self.metrics = LanguageMetrics()
        self.memory_gain = MemoryGain(segment_length, list_sources(self.model)) if measure_memory_gain else None
        distillation = self.distillation
        self._resets_every_step = bool(compression_rates) or (
            distillation is not None and distillation.resets_every_step
        )
        carry = self.carry if self.carries_state and not self._resets_every_step else None
        self._distillation = None if distillation is None else LanguageDistillation(distillation, carry)

    def setup(self, stage: str) -> None:
        """Check the data and load the teacher when training begins."""
        if self._distillation is not None:
            self._distillation.setup(self.datamodule)
        super().setup(stage)

    # Steps

    def _eval_context(self) -> AbstractContextManager[None]:
        length, clamp, same_length = self._eval_settings
        return memory_length(self.model, length, clamp_length=clamp, same_length=same_length)

    def _initial_state(self, stage: str, batch: Batch, batch_idx: int) -> MemoryState:
        batch_size = batch.tokens.shape[0]
        if not self.carries_state or (stage == "train" and self._resets_every_step):
            return self.model.init_state(batch_size)
        overfits = stage == "train" and getattr(self.trainer, "overfit_batches", 0) > 0
        if batch_idx == 0 and (stage != "train" or overfits):
            # The trainer repeats the same batches in every epoch: they are to be read from the same state.
            self.carry.reset(stage)
        state = self.carry.get_state(stage, self.model, batch_size)
        if stage != "train" or overfits:
            return state
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self.state_reset(state, seed=self.tokens_seen, rank=rank, world_size=world_size)

    def _read(self, stage: str, batch: Batch, state: MemoryState) -> UnrollOutput:
        loss_fn = None
        if stage == "train" and self._distillation is not None:
            loss_fn = self._distillation.make_loss_fn(self.model, batch, self.progress)
        output = unroll(
            self.model,
            batch.tokens,
            batch.labels,
            batch.document_starts,
            state,
            segment_length=self.segment_length,
            replay=self.replay and torch.is_grad_enabled(),
            loss_fn=loss_fn,
        )
        if stage != "train" or not self._resets_every_step:
            # Before any callback runs, because callbacks save checkpoints.
            self.carry.set_state(stage, output.state)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        self.rate_sampler.sample()
        output = self._read("train", batch, self._initial_state("train", batch, batch_idx))
        self._log_training_step(output.loss, batch.tokens)
        nll_per_byte = output.nll.sum(dtype=torch.float64) / batch.num_bytes.sum().clamp(min=1)
        self.log("train_bits_per_byte", (nll_per_byte / math.log(2)).float(), prog_bar=True)
        for name, value in output.losses.items():
            self.log(f"train_{name}", value)
        return output.loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Restore the model's own compression rate, after the backward pass, which may recompute segments."""
        self.rate_sampler.restore_default()

    def evaluate_batch(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Update and log the metrics of a stage."""
        with self._eval_context():
            state = self._initial_state(stage, batch, batch_idx)
            output = self._read(stage, batch, state)
            if stage == "val" and self.memory_gain is not None:
                is_first = batch_idx == 0 or not self.carries_state
                self.memory_gain.update(self.model, batch, output.nll, state, is_first=is_first)
        self.metrics.update_and_log(self, stage, batch, output.nll.sum(dtype=torch.float64), output.num_scored)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of each label in nats, ``(batch, length)``."""
        with self._eval_context():
            return self._read("predict", batch, self._initial_state("predict", batch, batch_idx)).nll

    def log_at_epoch_end(self, stage: str) -> None:
        """Log the word perplexity and, in validation, the gain from memory, in total and by distance."""
        self.metrics.log_word_perplexity(self, stage)
        if stage == "val" and self.memory_gain is not None:
            # The same on all ranks: their mean is that, too.
            values = {f"val_{name}": value for name, value in self.memory_gain.compute_and_reset().items()}
            self.log_dict(values, sync_dist=True)

    def on_validation_end(self) -> None:
        """Free the state of validation."""
        self.carry.reset("val")

    # Checkpoints

    def step_state(self) -> dict[str, Any]:
        """Return what a training step changes besides weights and random state, the carried states too."""
        return {**super().step_state(), "carry": self.carry.states()}

    def restore_step_state(self, state: dict[str, Any]) -> None:
        """Go back to what :meth:`step_state` returned."""
        super().restore_step_state(state)
        self.carry.restore_states(state["carry"])

    def rank_state(self) -> dict[str, Any]:
        """Return the carried states."""
        return {key: self.carry.state_dict(stage) for key, stage in _SAVED_STAGES.items()} if self.carries_state else {}

    def restore_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore the carried states; see :func:`memtx.training.carry.restore_rank_state`."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        for key, stage in _SAVED_STAGES.items() if self.carries_state else ():
            tensors = [state.get(key, {}) for state in states]
            loader = self.trainer.train_dataloader
            self.carry.load_state_dict(stage, restore_rank_state(tensors, loader, rank, world_size))


class SummaryModule(LanguageModule):
    """Trains a memory transformer on texts and their summaries; see :class:`LanguageModule` for its arguments.

    Every batch starts with fresh streams. ``val_bits_per_byte`` and ``val_word_perplexity`` are those of the summaries.
    """

    carries_state = False
