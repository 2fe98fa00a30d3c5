"""Distillation of language models, whose batches are read segment by segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.books import BookDataModule
from memtx.errors import MemtxError
from memtx.memory.base import Losses
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import MemoryOutput
from memtx.training.carry import Carry
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.model_outputs import ModelOutputs, collect_language_outputs, get_output_head
from memtx.training.tbptt import LossFn

TEACHER_STAGE = "teacher"
"""Stage of the carry that holds the teacher's state."""


class LanguageDistillation:
    """Losses of a language model's segments against a teacher that reads the whole batch at once.

    Args:
        distillation: Teacher and losses.
        carry: Holds the teacher's state between batches. None starts every batch with fresh streams.
    """

    def __init__(self, distillation: Distillation, carry: Carry | None) -> None:
        self.distillation, self.carry = distillation, carry
        self._books: BookDataModule | None = None

    def setup(self, datamodule: Any) -> None:
        """Raise MemtxError if logits are cached by position but the run does not read a book corpus in order."""
        self._books = datamodule if isinstance(datamodule, BookDataModule) else None
        if self.distillation.uses_cache and (self._books is None or self.carry is None):
            raise MemtxError(
                "distillation.cache_dir caches logits by position in a book corpus, but this run reads examples or "
                "starts every step with fresh streams.",
                "Remove cache_dir from model.distillation.",
            )

    def make_loss_fn(self, student: nn.Module, batch: Batch, progress: float) -> LossFn:
        """Read a batch with the teacher and return the losses of the student's segments at this fraction of the run."""
        assert isinstance(student, MemoryTransformer)
        teacher_outputs = self._read_with_teacher(student, batch)

        def loss_fn(output: MemoryOutput, part: slice) -> Losses:
            assert output.hidden_states is not None
            outputs = collect_language_outputs(
                student,
                output.hidden_states,
                batch.labels[:, part],
                batch.document_starts[:, part],
                output.language_loss,
            )
            return self.distillation.compute_losses(outputs, teacher_outputs(part), progress)

        return loss_fn

    def _read_with_teacher(self, student: MemoryTransformer, batch: Batch) -> Callable[[slice], ModelOutputs]:
        """Return the teacher's outputs as a function of the segment; logits in the cache are not computed again."""
        table = self.distillation.logit_table
        if table is None:
            teacher = self._get_teacher(student, batch)
            hidden_states = self._teacher_hidden_states(teacher, batch)

            def compute_outputs(part: slice) -> ModelOutputs:
                states = tuple(layer[:, part] for layer in hidden_states)
                return collect_language_outputs(teacher, states, batch.labels[:, part], batch.document_starts[:, part])

            return compute_outputs
        assert self._books is not None
        indices = self._books.token_indices()
        if not table.is_complete:
            teacher = self._get_teacher(student, batch)
            table.fill(indices, get_output_head(teacher), self._teacher_hidden_states(teacher, batch)[-1])
        logits, classes = (tensor.to(batch.tokens.device) for tensor in table.get(indices))

        def load_outputs(part: slice) -> ModelOutputs:
            scored = batch.labels[:, part] != IGNORE_INDEX
            return ModelOutputs(logits[:, part][scored], class_indices=classes[:, part][scored])

        return load_outputs

    def _get_teacher(self, student: MemoryTransformer, batch: Batch) -> MemoryTransformer:
        teacher = self.distillation.get_teacher(batch.tokens.device, student, batch.tokens.shape[1])
        assert isinstance(teacher, MemoryTransformer)
        return teacher

    @torch.no_grad()
    def _teacher_hidden_states(self, teacher: MemoryTransformer, batch: Batch) -> tuple[Tensor, ...]:
        """Return the outputs of the embedding and of every layer, each ``(batch, length, dim)``."""
        batch_size = batch.tokens.shape[0]
        if self.carry is None:
            state = teacher.init_state(batch_size)
        else:
            state = self.carry.get_state(TEACHER_STAGE, teacher, batch_size)
        output = teacher(
            batch.tokens,
            state,
            document_starts=batch.document_starts,
            # With labels, logits are not computed.
            labels=torch.full_like(batch.labels, IGNORE_INDEX),
            return_hidden_states=True,
        )
        if self.carry is not None:
            self.carry.set_state(TEACHER_STAGE, output.state)
        hidden_states: tuple[Tensor, ...] = output.hidden_states
        return hidden_states
