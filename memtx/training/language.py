"""Language modeling with truncated back-propagation through time: the state is carried from batch to batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from memtx.data.batch import Batch
from memtx.errors import MemtxError
from memtx.models.add_memory import Retrofit
from memtx.models.memory_length import memory_length
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.sources import list_sources
from memtx.state import MemoryState
from memtx.training.compression_rates import CompressionRateSampler
from memtx.training.distillation.language import LanguageDistillation
from memtx.training.lora import LoRA, freeze_base_model
from memtx.training.metrics import LanguageMetrics, MemoryGain, sum_by_position
from memtx.training.recurrent_module import RecurrentModule
from memtx.training.tbptt import UnrollOutput


class LanguageModule(RecurrentModule):
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
        super().__init__(
            model(vocab_size),
            segment_length,
            compile=compile,
            compile_mode=compile_mode,
            activation_checkpointing=activation_checkpointing,
            replay=replay,
            state_reset_prob=state_reset_prob,
            **options,
        )
        self.rate_sampler = CompressionRateSampler(self.model, compression_rates)
        if freeze_base:
            freeze_base_model(self.model, lora)
        elif lora is not None:
            raise MemtxError("lora adapts a frozen base, but freeze_base is false.", "Set freeze_base, or remove lora.")
        self._eval_settings = eval_memory, clamp, same_length
        with self._eval_context():  # raises for a model that it does not fit
            pass
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

    def _read(self, stage: str, batch: Batch, state: MemoryState) -> UnrollOutput:
        loss_fn = None
        if stage == "train" and self._distillation is not None:
            loss_fn = self._distillation.make_loss_fn(self.model, batch, self.progress)
        return self._unroll(stage, batch.tokens, batch, state, loss_fn)

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
            if self.picture_sums is not None:
                self.add_to_picture("position", sum_by_position(batch, output.nll, state))
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


class SummaryModule(LanguageModule):
    """Trains a memory transformer on texts and their summaries; see :class:`LanguageModule` for its arguments.

    Every batch starts with fresh streams. ``val_bits_per_byte`` and ``val_word_perplexity`` are those of the summaries.
    """

    carries_state = False
