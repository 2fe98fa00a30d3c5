"""A model with memory as its own teacher: what its attention alone would have said, with everything in sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.distillation.distillation import Distillation
from memtx.training.distillation.losses import HardLabels, Loss, SoftTargets
from memtx.training.distillation.shown import Sizes


class OwnAttention(Distillation):
    """Distillation of a memory transformer's own attention to a whole batch into its memory.

    The teacher has the student's weights as they are at each step, no memory, and every token of a row in sight; so
    batches are to be no longer than the model was trained on. Every step begins with fresh streams, so that both read
    the same text.

    Args:
        losses: makes the losses from the sizes of student and teacher.
    """

    fresh = True

    def __init__(self, losses: Sequence[Callable[[Sizes, Sizes], Loss]] = (SoftTargets, HardLabels)) -> None:
        super().__init__(None, losses)

    def open(self, student: nn.Module, data: Any = None) -> None:
        """Make the losses.

        Raises:
            MemtxError: the student is no memory transformer, or the losses do not fit it.
        """
        if not isinstance(student, MemoryTransformer):
            raise MemtxError(
                f"A {type(student).__name__} has no memory to be taught by its own attention.",
                "Give a MemoryTransformer, or Distillation with another teacher.",
            )
        sizes = Sizes.of(student)
        self._make(sizes, sizes)

    def teacher(self, device: torch.device, student: nn.Module, tokens: int) -> nn.Module:
        """Return the student's weights with so many tokens in sight, in eval mode."""
        return cast(MemoryTransformer, student).without_memory(tokens).eval()
