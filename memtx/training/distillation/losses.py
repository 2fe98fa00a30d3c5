"""Distillation losses: the base class, and losses of logits, labels and embeddings.

Outputs are compared in float32 or better, without gradients for the teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtx.errors import MemtxError, check_at_least, check_positive
from memtx.ops.cpu.linear import Linear
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs

CHUNK_SIZE = 512
"""Positions whose logits are in memory at a time, for student and teacher."""


class DistillationLoss(nn.Module, ABC):
    """One term of the training loss.

    Args:
        student: Dimensions of the student.
        teacher: Dimensions of the teacher.
        weight: Factor in the sum. Defaults to 1.0.
        begin: Fraction of the run's optimizer steps from which the loss counts. Defaults to 0.0.
        end: Fraction of the run's optimizer steps until which the loss counts. Defaults to 1.0.

    Raises:
        MemtxError: A number is out of range, or the models do not fit each other.
    """

    required_outputs: ClassVar[Literal["scores", "hidden", "nothing"]] = "hidden"
    """Outputs of the teacher that the loss needs."""

    has_projection: ClassVar[bool] = False
    """If True, ``project`` maps hidden states of the student to the teacher's width, trained with the student."""

    project: nn.Module

    def __init__(
        self, student: ModelDims, teacher: ModelDims, weight: float = 1.0, begin: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_at_least(0, **{f"{name}'s weight": weight})
        if not 0.0 <= begin < end <= 1.0:
            raise MemtxError(
                f"{name} begins at {begin} and ends at {end}.", "Choose fractions of the run, such as 0.0 and 0.5."
            )
        self.check_dims(student, teacher)
        self.weight, self.begin, self.end = weight, begin, end
        if self.has_projection:
            equal_dims = student.dim == teacher.dim
            self.project = nn.Identity() if equal_dims else Linear(student.dim, teacher.dim, bias=False)

    def check_dims(self, student: ModelDims, teacher: ModelDims) -> None:
        """Raise MemtxError unless the loss can compare models of these dimensions."""
        for name, dims in (("student", student), ("teacher", teacher)):
            if self.required_outputs == "hidden" and not dims.depth:
                raise MemtxError(
                    f"{type(self).__name__} compares layers, and the {name} ({dims.name}) returns none.",
                    "Use an Encoder or a MemoryTransformer, or SoftTargets alone.",
                )

    def is_active(self, progress: float) -> bool:
        """Return whether the loss counts at this fraction of the run."""
        return self.begin <= progress and (progress < self.end or self.end == 1.0)

    @abstractmethod
    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the unweighted loss, ``()``."""

    def aligned_hidden(
        self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return ``(tokens, dim)`` hidden states of both at unpadded positions, the student's projected.

        ``layers`` are the student's and the teacher's; -1 means the embeddings.
        """
        mask = student.token_mask
        student_hidden, teacher_hidden = (
            outputs.hidden_states[layer + 1][mask] for outputs, layer in zip((student, teacher), layers, strict=True)
        )
        return upcast(self.project(student_hidden)), upcast(teacher_hidden.detach())


class HardLabels(DistillationLoss):
    """The student's loss on the labels, as without a teacher."""

    required_outputs = "nothing"

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the student's loss."""
        assert student.loss is not None
        return student.loss


class SoftTargets(DistillationLoss):
    """Divergence of the student's distribution from the teacher's (Hinton et al. 2015, section 2).

    T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, averaged over scored positions; in masked language
    modeling over all tokens, masked or not (DistilBERT, Sanh et al. 2019). Logits are computed in chunks that the
    backward pass recomputes, so that those of a whole vocabulary are never stored. If only the teacher's top-k logits
    are known, its distribution is over these classes; ids that only the teacher's vocabulary has are left out. Other
    arguments are those of :class:`DistillationLoss`.

    Args:
        temperature: T, above 0. Defaults to 2.0.
        masked_only: If True, compare masked language models at masked tokens only. Defaults to False.

    Raises:
        MemtxError: A number is out of range, a model has no logits, or the models have different numbers of classes.
    """

    required_outputs = "scores"

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        temperature: float = 2.0,
        masked_only: bool = False,
        **options: float,
    ) -> None:
        super().__init__(student, teacher, **options)
        check_positive(temperature=temperature)
        self.temperature, self.masked_only = temperature, masked_only

    def check_dims(self, student: ModelDims, teacher: ModelDims) -> None:
        """Raise MemtxError unless both models have equally many classes."""
        if not teacher.num_classes:
            raise MemtxError(
                f"SoftTargets needs a teacher with logits, but this {teacher.name} has no head for the task.",
                "Fine-tune it first and use that run, or remove SoftTargets.",
            )
        # A published vocabulary may be padded beyond its tokenizer's ids, and so beyond the student's.
        has_padding = teacher.classes_are_tokens and teacher.num_classes > student.num_classes
        if student.num_classes != teacher.num_classes and not (student.classes_are_tokens and has_padding):
            raise MemtxError(
                f"The student has {student.num_classes} classes, the teacher {teacher.num_classes}.",
                "Use the same vocabulary or labels for both, such as the tokenizer the teacher was trained with.",
            )

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the mean divergence."""
        assert student.features is not None
        assert teacher.features is not None

        def divergence(student_chunk: Tensor, teacher_chunk: Tensor, classes: Tensor | None) -> Tensor:
            logits = student_chunk if student.head is None else student.head(student_chunk)
            log_probs = F.log_softmax(upcast(logits) / self.temperature, dim=-1)
            with torch.no_grad():
                teacher_logits = teacher_chunk if teacher.head is None else teacher.head(teacher_chunk)
                if classes is None:
                    teacher_logits = teacher_logits[:, : logits.shape[-1]]
                target = F.softmax(upcast(teacher_logits) / self.temperature, dim=-1)
            if classes is not None:
                log_probs = log_probs.gather(-1, classes)
            # 0 log 0 = 0, for the padding of the top k.
            return (torch.xlogy(target, target) - torch.where(target > 0, target * log_probs, 0.0)).sum()

        features = (student.features, teacher.features)
        if self.masked_only and student.masked is not None:
            features = (features[0][student.masked], features[1][student.masked])
        count = len(features[0])
        total = upcast(features[0]).sum() * 0.0
        for start in range(0, count, CHUNK_SIZE):
            part = slice(start, start + CHUNK_SIZE)
            classes = None if teacher.class_indices is None else teacher.class_indices[part]
            chunks = (features[0][part], features[1][part], classes)
            if student.head is None:
                total = total + divergence(*chunks)
            else:
                total = total + checkpoint(divergence, *chunks, use_reentrant=False)
        return total * self.temperature**2 / max(1, count)


class EmbeddingMSE(DistillationLoss):
    """Mean squared difference of the embedding outputs (TinyBERT, Jiao et al. 2020, section 3, eq. 9)."""

    has_projection = True

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the mean over tokens and dimensions."""
        return F.mse_loss(*self.aligned_hidden(student, teacher, (-1, -1)))


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
