"""Language modelling through time: a horizon of segments a step, the state carried from batch to batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.books import BookDataModule
from memtx.errors import CheckpointError, MemtxError, check_at_least
from memtx.memory.base import Losses, Memory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.retrofit import Retrofit
from memtx.models.transformer_xl import TransformerXL
from memtx.segment import Segment
from memtx.state import MemoryState
from memtx.training.base_module import BaseModule
from memtx.training.carry import Carry
from memtx.training.compression_rates import CompressionRateSampler
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.model_outputs import ModelOutputs
from memtx.training.distillation.reading import collect_language_outputs, fill_logit_table
from memtx.training.elastic_resume import reassign_streams
from memtx.training.lora import LoRA
from memtx.training.memory_gain import MemoryGain, has_memory
from memtx.training.metrics import LanguageMetrics
from memtx.training.optimizers import WarmupCosine
from memtx.training.tbptt import LossFn, UnrollOutput, unroll

_CARRIED_STAGES = {"carry": "train", "teacher": "teacher"}
"""What a checkpoint keeps of the carry: by its name there, the stage."""

DEFAULT_STATE_RESET_PROB = 0.05
"""Share of rows that begin a step afresh, where a memory is lasting."""


class LanguageModule(BaseModule):
    """Trains a memory transformer on streams of whole documents.

    A batch holds ``bptt_segments`` segments of every row; gradients flow through all of them and the memory between
    them, then the state is cut from its graph and carried to the next batch. It is fresh only where a
    document begins.

    Args:
        model: makes the model from the vocabulary's size; ``Retrofit`` makes it from a folder.
        vocab_size: of the tokenizer; flows from the data.
        segment_length: tokens a call; flows from the data.
        optimizer: makes the optimiser from parameter groups; None for AdamW (rate 1e-3, betas 0.9 and 0.95,
            decay 0.1). Norms and biases are in a group of their own without decay.
        scheduler: makes the schedule from the optimiser, stepped every optimiser step; ``WarmupCosine`` by
            default. None for a constant rate.
        compile: whether to run the model through ``torch.compile``.
        activation_checkpointing: whether the backward pass computes each layer again, which takes a third more time and
            keeps one layer's activations instead of all layers'.
        measure_memory_gain: whether every validation also measures what the memory is worth, by reading the texts once
            more with it cleared at every segment (``val_memory_gain`` and, by distance from a document's beginning in
            tokens, ``val_memory_gain_N``).
        replay: whether to keep states alone between a horizon's segments and read each once more in the backward
            pass: the same gradients, about a third more time, and memory that hardly grows with the horizon.
        freeze_base: whether the memories alone learn, and the model that they were added to stays as it is.
        lora: beside a frozen base, low-rank matrices that learn too; None for none. Checkpoints hold them apart from
            the base, and whatever reads one has them merged in.
        compression_rates: compression rates of which every training step draws one; empty for the model's own. Each
            step then begins with fresh streams.
        distillation: a teacher and what of it the model is to learn beside, or instead of, the labels; None for none.
            ``SelfDistillation`` teaches a memory what the model's attention would say with a whole batch in sight.
        state_reset_prob: share of the rows that begin a step with a fresh memory in the midst of their document; None
            for 0.05 where a memory is ``unbounded``, else for none. Without any, what such a memory took up early in
            training stays in it, since gates have learned to close since, and the model comes to lean on it as on a
            bias: then it is lost where a document begins.

    Raises:
        MemtxError: a number is out of its range, nothing would learn, or ``lora`` is given for a base that learns
            itself.
    """

    model: MemoryTransformer

    def __init__(
        self,
        model: Callable[[int], MemoryTransformer | TransformerXL] | Retrofit = MemoryTransformer,
        vocab_size: int = 257,
        segment_length: int = 512,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = WarmupCosine,
        compile: bool = False,
        activation_checkpointing: bool = False,
        measure_memory_gain: bool = True,
        replay: bool = False,
        freeze_base: bool = False,
        compression_rates: Sequence[int] = (),
        distillation: Distillation | None = None,
        lora: LoRA | None = None,
        state_reset_prob: float | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, distillation)
        check_at_least(1, segment_length=segment_length)
        if state_reset_prob is not None and not 0.0 <= state_reset_prob <= 1.0:
            raise MemtxError(f"state_reset_prob is {state_reset_prob}, expected a share from 0 to 1.", "Change it.")
        # A Transformer-XL is called as a memory transformer is.
        self.model = cast(MemoryTransformer, model(vocab_size))
        if activation_checkpointing and not hasattr(self.model, "activation_checkpointing"):
            raise MemtxError(f"A {type(self.model).__name__} has no activation_checkpointing.", "Leave it out.")
        self.model.activation_checkpointing = activation_checkpointing
        self.rate_sampler = CompressionRateSampler(self.model, compression_rates)
        if freeze_base:
            _freeze_base(self.model, lora)
        elif lora is not None:
            raise MemtxError(
                "lora adapts a base that stays as it is, but here the base learns itself.",
                "Set freeze_base to true, or leave lora out.",
            )
        self.segment_length = segment_length
        self.replay = replay
        lasting = any(isinstance(one, Memory) and one.unbounded for one in self.model.modules())
        self.state_reset_prob = state_reset_prob if state_reset_prob is not None else DEFAULT_STATE_RESET_PROB * lasting
        if compile:
            # In place: a wrapper would double every weight in the checkpoint.
            self.model.compile(dynamic=False)
        self.carry = Carry()
        self.metrics = LanguageMetrics()
        self.memory_gain = MemoryGain(segment_length) if measure_memory_gain else None

    def setup(self, stage: str) -> None:
        """Open the teacher, where there is one and training begins."""
        if self.distillation is not None and self.distillation.uses_cache:
            data = getattr(self.trainer, "datamodule", None)
            if self._resets_every_step or not isinstance(data, BookDataModule):
                raise MemtxError(
                    "A teacher's scores are kept by the places of a corpus that is read on and on, and this run is "
                    "another: it reads examples, or draws rates.",
                    "Leave the distillation's cache_dir out.",
                )
        super().setup(stage)

    # One batch

    def _get_state(self, stage: str, batch: Batch, model: MemoryTransformer | None = None) -> MemoryState:
        return self.carry.get_state(stage, self.model if model is None else model, batch.tokens.shape[0])

    def _reset_random_streams(self, state: MemoryState) -> MemoryState:
        """Return a state of which some rows are fresh; which ones depends on the tokens seen, and on all rows."""
        if not self.state_reset_prob:
            return state
        draw = torch.Generator().manual_seed(self.tokens_seen)
        first = self.trainer.global_rank * state.batch_size
        drawn = torch.rand(self.trainer.world_size * state.batch_size, generator=draw)
        fresh = drawn[first : first + state.batch_size] < self.state_reset_prob
        return state.reset(fresh) if fresh.any() else state

    def _unroll(self, stage: str, batch: Batch, state: MemoryState) -> UnrollOutput:
        training = stage == "train"
        out = unroll(
            self.model,
            batch.tokens,
            batch.labels,
            batch.document_starts,
            state,
            segment_length=self.segment_length,
            replay=self.replay and torch.is_grad_enabled(),
            loss_fn=self._make_loss_fn(self.distillation, batch)
            if training and self.distillation is not None
            else None,
        )
        if training and self._resets_every_step:
            return out
        # Final before any callback runs: checkpoints are saved by callbacks that come first.
        self.carry.set_state(stage, out.state)
        return out

    def _make_loss_fn(self, distillation: Distillation, batch: Batch) -> LossFn:
        """Return what compares a segment of the student's with what the teacher makes of the same places."""
        teacher = self._make_teacher_fn(distillation, batch)
        share = self.progress

        def judge(student: MemoryOutput, part: slice) -> Losses:
            labels, starts = batch.labels[:, part], batch.document_starts[:, part]
            assert student.hidden_states is not None
            own = collect_language_outputs(self.model, student.hidden_states, labels, starts, student.language_loss)
            return distillation.compute_losses(own, teacher(labels, starts, part), share)

        return judge

    def _make_teacher_fn(
        self, distillation: Distillation, batch: Batch
    ) -> Callable[[Tensor, Tensor, slice], ModelOutputs]:
        """Let the teacher read a batch, where its scores are not known, and return what shows it of some places."""
        table, places = distillation.logit_table, None
        if table is not None:
            places = cast(BookDataModule, cast(Any, self.trainer).datamodule).token_indices()
        if table is None or not table.is_complete:
            model = cast(
                MemoryTransformer, distillation.get_teacher(batch.tokens.device, self.model, batch.tokens.shape[1])
            )
            hidden = self._teacher_hidden_states(model, batch)
            if table is None or places is None:
                return lambda labels, starts, part: collect_language_outputs(
                    model, tuple(x[:, part] for x in hidden), labels, starts
                )
            fill_logit_table(table, places, model, hidden[-1])
        assert places is not None
        values, index = (one.to(batch.tokens.device) for one in table.get(places))

        def kept(labels: Tensor, starts: Tensor, part: slice) -> ModelOutputs:
            scored = labels != IGNORE_INDEX
            return ModelOutputs(values[:, part][scored], class_indices=index[:, part][scored])

        return kept

    @torch.no_grad()
    def _teacher_hidden_states(self, teacher: MemoryTransformer, batch: Batch) -> tuple[Tensor, ...]:
        """Return (rows, length, dim) each, what a teacher's layers make of a batch; what it carries is carried on."""
        state = (
            teacher.init_state(batch.tokens.shape[0])
            if self._resets_every_step
            else self._get_state("teacher", batch, teacher)
        )
        unscored = torch.full_like(batch.labels, IGNORE_INDEX)
        out = teacher(
            batch.tokens, state, document_starts=batch.document_starts, labels=unscored, return_hidden_states=True
        )
        if not self._resets_every_step:
            self.carry.set_state("teacher", out.state)
        assert out.hidden_states is not None
        return tuple(out.hidden_states)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the horizon's loss."""
        self.rate_sampler.sample()
        rows = batch.tokens.shape[0]
        carried = (
            self.model.init_state(rows)
            if self._resets_every_step
            else self._reset_random_streams(self._get_state("train", batch))
        )
        out = self._unroll("train", batch, carried)
        self._log_training_step(out.loss, batch.tokens)
        nats = out.nll.sum(dtype=torch.float64) / batch.num_bytes.sum().clamp(min=1)
        self.log("train_bits_per_byte", (nats / torch.log(nats.new_tensor(2.0))).float(), prog_bar=True)
        for name, value in out.losses.items():
            self.log(f"train_{name}", value)
        return out.loss

    @property
    def _resets_every_step(self) -> bool:
        """Whether training carries nothing from batch to batch."""
        return bool(self.rate_sampler.rates or (self.distillation is not None and self.distillation.resets_every_step))

    def on_train_batch_end(self, *_: Any) -> None:
        """Go back to the model's own rate, after the backward pass, which may read once more."""
        self.rate_sampler.restore_default()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        before = self._get_state(stage, batch)
        out = self._unroll(stage, batch, before)
        if stage == "val" and self.memory_gain is not None and has_memory(before):
            position = Segment.from_document_starts(
                before.position, batch.tokens.shape[1], batch.document_starts
            ).position
            self.memory_gain.update(self.model, batch, out.nll, position)
        self.metrics.update_and_log(self, stage, batch, out.nll.sum(dtype=torch.float64), out.num_scored)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the validation streams."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch of the test streams."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return (rows, tokens) negative log-likelihoods in nats of the batch's labels."""
        return self._unroll("predict", batch, self._get_state("predict", batch)).nll

    def on_validation_start(self) -> None:
        """Begin fresh."""
        self.carry.reset("val")

    def on_validation_epoch_end(self) -> None:
        """Log what the memory is worth at every distance that some text has."""
        if self.memory_gain is None:
            return
        for name, metric in self.memory_gain.named_metrics():
            # Summed over ranks here, so that all of them log the same names.
            if metric.update_called and not (worth := metric.compute()).isnan():
                self.log(f"val_{name}", worth.float())
            metric.reset()

    def on_validation_end(self) -> None:
        """Leave nothing."""
        self.carry.reset("val")

    def on_test_start(self) -> None:
        """Begin fresh."""
        self.carry.reset("test")

    def on_predict_start(self) -> None:
        """Begin fresh."""
        self.carry.reset("predict")

    # What a checkpoint holds beside the weights

    def rank_state(self) -> dict[str, Any]:
        """Return what is carried."""
        return {stage: self.carry.state_dict(own) for stage, own in _CARRIED_STAGES.items()}

    def restore_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Carry it again; where there are other rows or processes, the first rows go on with theirs."""
        rank = self.trainer.global_rank
        rows = getattr(self.trainer.train_dataloader, "batch_size", None)
        if not isinstance(rows, int) and len(states) != self.trainer.world_size:
            raise CheckpointError(
                f"The checkpoint is of {len(states)} processes, this run has {self.trainer.world_size}, and its data "
                "does not say how many rows it has.",
                "Resume with as many, or start a new run from its weights.",
            )
        for stage, own in _CARRIED_STAGES.items():
            carried = [one.get(stage, {}) for one in states]
            self.carry.load_state_dict(
                own, reassign_streams(carried, rows, rank) if isinstance(rows, int) else carried[rank]
            )


def _freeze_base(model: MemoryTransformer, lora: LoRA | None) -> None:
    if not isinstance(model, MemoryTransformer):
        raise MemtxError(f"freeze_base is for added memory, and a {type(model).__name__} has none.", "Leave it out.")
    adapters = lora(model) if lora is not None else {}
    learning = {id(parameter) for parameter in (*model.memory_parameters().values(), *adapters.values())}
    if not learning:
        raise MemtxError(
            "freeze_base leaves nothing that learns: the model has no memory with parameters.",
            "Add one, such as CompressedMemory with its gates, adapt the model by lora, or train the whole of it.",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
