"""Base of the modules that train by truncated back-propagation through time: the state carried between batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import check_at_least
from memtx.models.recurrent_lm import RecurrentModel
from memtx.state import MemoryState
from memtx.training.base_module import BaseModule
from memtx.training.carry import Carry, StateReset, restore_rank_state
from memtx.training.distillation.language import TEACHER_STAGE
from memtx.training.tbptt import LossFn, UnrollOutput, unroll

_SAVED_STAGES = {"carry": "train", "teacher": TEACHER_STAGE}
"""Stages of the carry in a checkpoint, by key there."""


class RecurrentModule(BaseModule):
    """Reads batches segment by segment, with the state of each stage carried from one batch to the next.

    Args:
        model: A :class:`memtx.models.recurrent_lm.RecurrentModel`.
        segment_length: Steps per call.
        compile: If True, run the model through ``torch.compile``.
        compile_mode: Mode of ``torch.compile``.
        activation_checkpointing: If True, recompute each layer in the backward pass.
        replay: If True, recompute each segment in the backward pass and store only the states between segments.
        state_reset_prob: Probability that a stream starts a step with a fresh state; see :class:`StateReset`.
        **options: ``optimizer``, ``scheduler``, ``gate_lr_multiplier`` and ``distillation`` of :class:`BaseModule`.
    """

    model: Any
    carries_state: ClassVar[bool] = True
    """If False, every batch starts with fresh streams."""

    def __init__(
        self,
        model: PretrainedModel,
        segment_length: int,
        *,
        compile: bool = False,
        compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        activation_checkpointing: bool = False,
        replay: bool = False,
        state_reset_prob: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(1, segment_length=segment_length)
        self.model = model
        self.model.activation_checkpointing = activation_checkpointing
        self.segment_length, self.replay = segment_length, replay
        self.state_reset = StateReset(self.model, state_reset_prob)
        if compile:
            # In place, because a wrapper would duplicate every weight in the checkpoint.
            self.model.compile(dynamic=False, mode=compile_mode)
        self.carry = Carry()
        self._resets_every_step = False

    @property
    def _stateful(self) -> RecurrentModel:
        """Model that the carried state belongs to."""
        model: RecurrentModel = self.model
        return model

    def _initial_state(self, stage: str, batch: Any, batch_idx: int) -> MemoryState:
        """Return the state that a batch, with ``document_starts``, is read from."""
        batch_size = batch.document_starts.shape[0]
        if not self.carries_state or (stage == "train" and self._resets_every_step):
            return self._stateful.init_state(batch_size)
        overfits = stage == "train" and getattr(self.trainer, "overfit_batches", 0) > 0
        if batch_idx == 0 and (stage != "train" or overfits):
            # The trainer repeats the same batches in every epoch: they are to be read from the same state.
            self.carry.reset(stage)
        state = self.carry.get_state(stage, self._stateful, batch_size)
        if stage != "train" or overfits:
            return state
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return self.state_reset(state, seed=self.tokens_seen, rank=rank, world_size=world_size)

    def _unroll(
        self, stage: str, inputs: Tensor, batch: Any, state: MemoryState, loss_fn: LossFn | None = None
    ) -> UnrollOutput:
        """Read the inputs of a batch with its labels and document starts, and carry the state."""
        output = unroll(
            self.model,
            inputs,
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
