"""What a student is to have like its teacher, each a small class made from the sizes of both.

Everything is compared in float32 at least, and a teacher is read without gradient.
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
from memtx.training.distillation.layer_map import EveryKthLayer, LastLayer, LayerMap
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs

CHUNK_SIZE = 512
"""Places whose scores exist at a time, of both models."""

QUERY_CHUNK_SIZE = 128
"""Places whose attention's scores exist at a time, of both models."""


class DistillationLoss(nn.Module, ABC):
    """One of the losses that a step adds up.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        weight: factor in the sum.
        begin: share of the run's optimiser steps from which on it counts.
        end: share of the run's optimiser steps up to which it counts.

    Raises:
        MemtxError: a number is out of range, or the two models do not fit each other.
    """

    required_outputs: ClassVar[Literal["scores", "hidden", "nothing"]] = "hidden"
    """What it takes of the teacher."""

    def __init__(
        self, student: ModelDims, teacher: ModelDims, weight: float = 1.0, begin: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_at_least(0, **{f"{name}'s weight": weight})
        if not 0.0 <= begin < end <= 1.0:
            raise MemtxError(f"{name} counts from {begin} to {end}.", "Give shares of the run, such as 0.0 and 0.5.")
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if self.required_outputs == "hidden" and not sizes.depth:
                raise MemtxError(
                    f"{name} compares layers, and the {whose}, a {sizes.name}, shows none.",
                    "Give an Encoder or a MemoryTransformer, or SoftTargets alone.",
                )
        self.weight, self.begin, self.end = weight, begin, end

    def is_active(self, progress: float) -> bool:
        """Return whether it counts when such a share of the run is done."""
        return self.begin <= progress and (progress < self.end or self.end == 1.0)

    @abstractmethod
    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the loss, a scalar, unweighted."""


class HardLabels(DistillationLoss):
    """What the student loses by the labels, as without a teacher."""

    required_outputs = "nothing"

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the loss."""
        assert student.loss is not None
        return student.loss


class SoftTargets(DistillationLoss):
    """The divergence of the student's distribution from the teacher's (Hinton et al. 2015, section 2).

    T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats, mean over what is scored. Scores are made in chunks
    that the backward pass makes again, so that those of a whole vocabulary never exist at once. Where the teacher's
    highest scores alone were kept, its distribution is over these classes.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        temperature: T, above 0.
        weight: factor in the sum.
        begin: share of the run's optimiser steps from which on it counts.
        end: share of the run's optimiser steps up to which it counts.

    Raises:
        MemtxError: a number is out of range, or one of the two has no scores or another number of them.
    """

    required_outputs = "scores"

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        temperature: float = 2.0,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        check_positive(temperature=temperature)
        if not teacher.num_classes:
            raise MemtxError(
                f"SoftTargets needs a teacher that scores, this {teacher.name} has no head for the task.",
                "Fine-tune it first and give that run, or leave SoftTargets out.",
            )
        if student.num_classes != teacher.num_classes:
            raise MemtxError(
                f"The student scores {student.num_classes} classes, the teacher {teacher.num_classes}.",
                "Both need the same vocabulary or labels: take the tokenizer that the teacher was trained with.",
            )
        self.temperature = temperature

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the loss."""
        own, wanted = student.features, teacher.features
        assert own is not None
        assert wanted is not None
        kept = teacher.class_indices
        index = [None] * -(-len(own) // CHUNK_SIZE) if kept is None else list(torch.split(kept, CHUNK_SIZE))

        def part(mine: Tensor, theirs: Tensor, classes: Tensor | None) -> Tensor:
            scores = mine if student.head is None else student.head(mine)
            log_own = F.log_softmax(upcast(scores) / self.temperature, dim=-1)
            with torch.no_grad():
                given = theirs if teacher.head is None else teacher.head(theirs)
                target = F.softmax(upcast(given) / self.temperature, dim=-1)
            if classes is not None:
                log_own = log_own.gather(-1, classes)
            # 0 log 0 = 0, where a class is none or a place is padding.
            return (torch.xlogy(target, target) - torch.where(target > 0, target * log_own, 0.0)).sum()

        total = upcast(own).sum() * 0.0
        chunks = (torch.split(own, CHUNK_SIZE), torch.split(wanted, CHUNK_SIZE), index)
        for mine, theirs, classes in zip(*chunks, strict=False):
            if student.head is None:
                total = total + part(mine, theirs, classes)
            else:
                total = total + checkpoint(part, mine, theirs, classes, use_reentrant=False)
        return total * self.temperature**2 / max(1, len(own))


class EmbeddingMSE(DistillationLoss):
    """The mean squared difference of what the embeddings made (TinyBERT, Jiao et al. 2020, section 3, eq. 9)."""

    def __init__(
        self, student: ModelDims, teacher: ModelDims, weight: float = 1.0, begin: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        self.project = _make_projection(student, teacher)

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the loss."""
        return F.mse_loss(*_project_hidden(self.project, student, teacher, 0, 0))


def _make_projection(student: ModelDims, teacher: ModelDims) -> nn.Module:
    """Return the map, which learns, that a student's states go through where they are narrower or wider."""
    return Linear(student.dim, teacher.dim, bias=False) if student.dim != teacher.dim else nn.Identity()


def _project_hidden(
    project: nn.Module, student: ModelOutputs, teacher: ModelOutputs, student_layer: int, teacher_layer: int
) -> tuple[Tensor, Tensor]:
    """Return (tokens, dim) of both at places where a token is; numbers as in ``ModelOutputs.hidden_states``."""
    there = student.token_mask
    own, other = student.hidden_states[student_layer][there], teacher.hidden_states[teacher_layer][there]
    return upcast(project(own)), upcast(other.detach())


class _LayerwiseLoss(DistillationLoss):
    """A loss of pairs of layers; arguments as :class:`DistillationLoss`'.

    Args:
        layers: which layers are compared; those of ``default_layers`` where None.
    """

    default_layers: ClassVar[type[LayerMap]] = EveryKthLayer

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        self.layer_pairs = (layers or self.default_layers()).pairs(student.depth, teacher.depth)
        if not self.layer_pairs:
            raise MemtxError(
                f"{type(self).__name__} compares layers, and its map names none.",
                "Give EveryKthLayer, ExplicitLayers or LastLayer.",
            )

    @abstractmethod
    def compare_layers(
        self, student: ModelOutputs, teacher: ModelOutputs, student_layer: int, teacher_layer: int
    ) -> Tensor:
        """Return the loss of one layer of the student and one of the teacher."""

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the mean over pairs."""
        each = [self.compare_layers(student, teacher, own, other) for own, other in self.layer_pairs]
        return torch.stack(each).mean()


class _HiddenStateLoss(_LayerwiseLoss):
    """A loss of what pairs of layers put out, one map for all of them; arguments as :class:`_LayerwiseLoss`'."""

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, layers, weight, begin, end)
        self.project = _make_projection(student, teacher)

    @abstractmethod
    def compare_hidden(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """Return the loss of (tokens, dim) and (tokens, dim)."""

    def compare_layers(
        self, student: ModelOutputs, teacher: ModelOutputs, student_layer: int, teacher_layer: int
    ) -> Tensor:
        """Return the loss of the two layers' outputs."""
        both = _project_hidden(self.project, student, teacher, student_layer + 1, teacher_layer + 1)
        return self.compare_hidden(*both)


class HiddenMSE(_HiddenStateLoss):
    """The mean squared difference of layers' outputs (TinyBERT, Jiao et al. 2020, section 3, eq. 8).

    Arguments as :class:`SoftTargets`' but for ``layers``, a map of layers, every k-th by default.
    """

    def compare_hidden(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """Return the mean over tokens and dimensions."""
        return F.mse_loss(student_hidden, teacher_hidden)


class HiddenCosine(_HiddenStateLoss):
    """One minus the cosine of layers' outputs (DistilBERT, Sanh et al. 2019, section 2), the last ones' by default.

    Arguments as :class:`SoftTargets`' but for ``layers``, a map of layers.
    """

    default_layers = LastLayer

    def compare_hidden(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """Return the mean over tokens."""
        return (1.0 - F.cosine_similarity(student_hidden, teacher_hidden, dim=-1)).mean()


class AttentionMSE(_LayerwiseLoss):
    """The mean squared difference of attention's scores (TinyBERT, Jiao et al. 2020, section 3, eq. 7).

    As they are before the softmax, and of the pairs of tokens that see each other in both. Arguments as
    :class:`SoftTargets`' but for ``layers``, a map of layers, every k-th by default.

    Raises:
        MemtxError: heads or layers do not fit, or one of the models has random blocks or a memory.
    """

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, layers, weight, begin, end)
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if not sizes.has_attention_maps:
                raise MemtxError(
                    f"AttentionMSE compares scores of pairs of tokens, and the {whose}, a {sizes.name}, sees random "
                    "blocks or a memory.",
                    "Use FullAttention or LongformerAttention in both, or compare ValueRelations or HiddenMSE instead.",
                )
        if student.heads != teacher.heads:
            raise MemtxError(
                f"The student has {student.heads} heads a layer, the teacher {teacher.heads}; maps are compared "
                "head by head.",
                f"Give the student {teacher.heads}, or compare ValueRelations, which can be cut into other heads.",
            )

    def compare_layers(
        self, student: ModelOutputs, teacher: ModelOutputs, student_layer: int, teacher_layer: int
    ) -> Tensor:
        """Return the mean over heads and pairs of tokens."""
        (first, last), (low, high) = student.distance_range(student_layer), teacher.distance_range(teacher_layer)
        first, last, length = max(first, low), min(last, high), student.token_mask.shape[1]

        def part(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
            seen = (
                student.pair_mask(queries, keys)
                & student.window_mask(student_layer, queries, keys)
                & teacher.window_mask(teacher_layer, queries, keys)
            )
            given = upcast(teacher.attention_scores(teacher_layer, queries, keys)).detach()
            difference = upcast(student.attention_scores(student_layer, queries, keys)) - given
            return (difference.square() * seen[:, None]).sum(), difference.shape[1] * seen.sum()

        total, count = upcast(student.hidden_states[0]).sum() * 0.0, student.token_mask.new_zeros((), dtype=torch.int64)
        for start in range(0, length, QUERY_CHUNK_SIZE):
            stop = min(start + QUERY_CHUNK_SIZE, length)
            # What one of the windows does not reach is not made.
            keys = slice(max(start + first, 0), min(stop + last, length))
            lost, pairs = checkpoint(part, slice(start, stop), keys, use_reentrant=False)
            total, count = total + lost, count + pairs
        return total / count.clamp(min=1)


class ValueRelations(_LayerwiseLoss):
    """The divergence of softmax(V V' / sqrt(head_dim)) (MiniLM, Wang et al. 2020, section 3.2, eq. 6).

    Decoders' tokens are related to themselves and what comes before them in their document, within what is read at
    once.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        layers: which layers are compared, the last ones by default.
        heads: heads that values are cut into (MiniLMv2, Wang et al. 2021, section 3.2); the layers' own by default.
        weight: factor in the sum.
        begin: share of the run's optimiser steps from which on it counts.
        end: share of the run's optimiser steps up to which it counts.

    Raises:
        MemtxError: heads or layers do not fit.
    """

    default_layers = LastLayer

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        layers: LayerMap | None = None,
        heads: int | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, layers, weight, begin, end)
        if heads is None and student.heads != teacher.heads:
            raise MemtxError(
                f"The student has {student.heads} heads a layer, the teacher {teacher.heads}.",
                f"Give the student {teacher.heads}, or give ValueRelations heads that divide both widths.",
            )
        self.heads = heads if heads is not None else student.heads
        check_at_least(1, heads=self.heads)
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if sizes.value_dim % self.heads:
                raise MemtxError(
                    f"The {whose}'s values are {sizes.value_dim} wide, which {self.heads} heads do not divide.",
                    "Choose a divisor of both widths.",
                )

    def compare_layers(
        self, student: ModelOutputs, teacher: ModelOutputs, student_layer: int, teacher_layer: int
    ) -> Tensor:
        """Return the mean over heads and tokens, in nats."""
        seen = student.pair_mask()[:, None]
        mine = self._log_relation(student.values(student_layer), seen)
        theirs = self._log_relation(teacher.values(teacher_layer), seen).detach()
        each = torch.where(seen, theirs.exp() * (theirs - mine), 0.0).sum()
        return each / (self.heads * student.token_mask.sum()).clamp(min=1)

    def _log_relation(self, values: Tensor, pair_mask: Tensor) -> Tensor:
        """Return (rows, heads, length, length), the logarithms of the relation of (rows, length, width) values."""
        x = upcast(values).view(*values.shape[:2], self.heads, -1).transpose(1, 2)
        # A finite stand-in: padding relates to nothing, and is not looked at.
        scores = (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~pair_mask, torch.finfo(x.dtype).min)
        return F.log_softmax(scores, dim=-1)


def upcast(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
