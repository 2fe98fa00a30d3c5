"""A model with memory as its own teacher: what its attention alone would have said, with everything in sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.losses import DistillationLoss, HardLabels, SoftTargets
from memtx.training.distillation.model_outputs import ModelDims


class SelfDistillation(Distillation):
    """Distillation of a memory transformer's own attention to a whole batch into its memory.

    The teacher has the student's weights as they are at each step, no memory, and every token of a row in sight; so
    batches are to be no longer than the model was trained on. Every step begins with fresh streams, so that both read
    the same text.

    Args:
        losses: makes the losses from the sizes of student and teacher.
    """

    resets_every_step = True

    def __init__(
        self, losses: Sequence[Callable[[ModelDims, ModelDims], DistillationLoss]] = (SoftTargets, HardLabels)
    ) -> None:
        super().__init__(None, losses)

    def setup(self, student: nn.Module, datamodule: Any = None) -> None:
        """Make the losses.

        Raises:
            MemtxError: the student is no memory transformer, or the losses do not fit it.
        """
        if not isinstance(student, MemoryTransformer):
            raise MemtxError(
                f"A {type(student).__name__} has no memory to be taught by its own attention.",
                "Give a MemoryTransformer, or Distillation with another teacher.",
            )
        sizes = ModelDims.from_model(student)
        self._build_losses(sizes, sizes)

    def get_teacher(self, device: torch.device, student: nn.Module, length: int) -> nn.Module:
        """Return the student's weights with so many tokens in sight, in eval mode."""
        return cast(MemoryTransformer, student).without_memory(length).eval()
