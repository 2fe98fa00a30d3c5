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

from memtx.errors import MemtxError, at_least, positive
from memtx.ops.linear import Linear
from memtx.training.distillation.layer_map import EveryKth, Last, LayerMap
from memtx.training.distillation.shown import Shown, Sizes

CHUNK = 512
"""Places whose scores exist at a time, of both models."""

QUERIES = 128
"""Places whose attention's scores exist at a time, of both models."""


class Loss(nn.Module, ABC):
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

    asks: ClassVar[Literal["scores", "hidden", "nothing"]] = "hidden"
    """What it takes of the teacher."""

    def __init__(
        self, student: Sizes, teacher: Sizes, weight: float = 1.0, begin: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        at_least(0, **{f"{name}'s weight": weight})
        if not 0.0 <= begin < end <= 1.0:
            raise MemtxError(f"{name} counts from {begin} to {end}.", "Give shares of the run, such as 0.0 and 0.5.")
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if self.asks == "hidden" and not sizes.depth:
                raise MemtxError(
                    f"{name} compares layers, and the {whose}, a {sizes.name}, shows none.",
                    "Give an Encoder or a MemoryTransformer, or SoftTargets alone.",
                )
        self.weight, self.begin, self.end = weight, begin, end

    def counts(self, share: float) -> bool:
        """Return whether it counts when such a share of the run is done."""
        return self.begin <= share and (share < self.end or self.end == 1.0)

    @abstractmethod
    def forward(self, student: Shown, teacher: Shown) -> Tensor:
        """Return the loss, a scalar, unweighted."""


class HardLabels(Loss):
    """What the student loses by the labels, as without a teacher."""

    asks = "nothing"

    def forward(self, student: Shown, teacher: Shown) -> Tensor:
        """Return the loss."""
        assert student.loss is not None
        return student.loss


class SoftTargets(Loss):
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

    asks = "scores"

    def __init__(
        self,
        student: Sizes,
        teacher: Sizes,
        temperature: float = 2.0,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        positive(temperature=temperature)
        if not teacher.outputs:
            raise MemtxError(
                f"SoftTargets needs a teacher that scores, this {teacher.name} has no head for the task.",
                "Fine-tune it first and give that run, or leave SoftTargets out.",
            )
        if student.outputs != teacher.outputs:
            raise MemtxError(
                f"The student scores {student.outputs} classes, the teacher {teacher.outputs}.",
                "Both need the same vocabulary or labels: take the tokenizer that the teacher was trained with.",
            )
        self.temperature = temperature

    def forward(self, student: Shown, teacher: Shown) -> Tensor:
        """Return the loss."""
        own, wanted = student.states, teacher.states
        assert own is not None
        assert wanted is not None
        index = [None] * -(-len(own) // CHUNK) if teacher.index is None else list(torch.split(teacher.index, CHUNK))

        def part(mine: Tensor, theirs: Tensor, classes: Tensor | None) -> Tensor:
            scores = mine if student.head is None else student.head(mine)
            log_own = F.log_softmax(wide(scores) / self.temperature, dim=-1)
            with torch.no_grad():
                given = theirs if teacher.head is None else teacher.head(theirs)
                target = F.softmax(wide(given) / self.temperature, dim=-1)
            if classes is not None:
                log_own = log_own.gather(-1, classes)
            # 0 log 0 = 0, where a class is none or a place is padding.
            return (torch.xlogy(target, target) - torch.where(target > 0, target * log_own, 0.0)).sum()

        total = wide(own).sum() * 0.0
        for mine, theirs, classes in zip(torch.split(own, CHUNK), torch.split(wanted, CHUNK), index, strict=False):
            if student.head is None:
                total = total + part(mine, theirs, classes)
            else:
                total = total + checkpoint(part, mine, theirs, classes, use_reentrant=False)
        return total * self.temperature**2 / max(1, len(own))


class Embeddings(Loss):
    """The mean squared difference of what the embeddings made (TinyBERT, Jiao et al. 2020, section 3, eq. 9)."""

    def __init__(
        self, student: Sizes, teacher: Sizes, weight: float = 1.0, begin: float = 0.0, end: float = 1.0
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        self.project = _projection(student, teacher)

    def forward(self, student: Shown, teacher: Shown) -> Tensor:
        """Return the loss."""
        return F.mse_loss(*_outputs(self.project, student, teacher, 0, 0))


def _projection(student: Sizes, teacher: Sizes) -> nn.Module:
    """Return the map, which learns, that a student's states go through where they are narrower or wider."""
    return Linear(student.dim, teacher.dim, bias=False) if student.dim != teacher.dim else nn.Identity()


def _outputs(project: nn.Module, student: Shown, teacher: Shown, own: int, other: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, dim) of both at places where a token is; numbers as in ``Shown.hidden``."""
    there = student.there
    return wide(project(student.hidden[own][there])), wide(teacher.hidden[other][there].detach())


class _OfLayers(Loss):
    """A loss of pairs of layers.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        layers: which layers are compared; those of ``default_layers`` where None.
        weight: factor in the sum.
        begin: share of the run's optimiser steps from which on it counts.
        end: share of the run's optimiser steps up to which it counts.
    """

    default_layers: ClassVar[type[LayerMap]] = EveryKth

    def __init__(
        self,
        student: Sizes,
        teacher: Sizes,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, weight, begin, end)
        self.pairs = (layers or self.default_layers()).pairs(student.depth, teacher.depth)
        if not self.pairs:
            raise MemtxError(
                f"{type(self).__name__} compares layers, and its map names none.", "Give EveryKth, Explicit or Last."
            )

    @abstractmethod
    def of_pair(self, student: Shown, teacher: Shown, own: int, other: int) -> Tensor:
        """Return the loss of one layer of the student and one of the teacher."""

    def forward(self, student: Shown, teacher: Shown) -> Tensor:
        """Return the mean over pairs."""
        return torch.stack([self.of_pair(student, teacher, own, other) for own, other in self.pairs]).mean()


class _Hidden(_OfLayers):
    """A loss of what pairs of layers put out, one map for all of them; arguments as :class:`_OfLayers`'."""

    def __init__(
        self,
        student: Sizes,
        teacher: Sizes,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, layers, weight, begin, end)
        self.project = _projection(student, teacher)

    @abstractmethod
    def between(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the loss of (tokens, dim) and (tokens, dim)."""

    def of_pair(self, student: Shown, teacher: Shown, own: int, other: int) -> Tensor:
        """Return the loss of the two layers' outputs."""
        return self.between(*_outputs(self.project, student, teacher, own + 1, other + 1))


class HiddenMSE(_Hidden):
    """The mean squared difference of layers' outputs (TinyBERT, Jiao et al. 2020, section 3, eq. 8).

    Arguments as :class:`SoftTargets`' but for ``layers``, a map of layers, every k-th by default.
    """

    def between(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the mean over tokens and dimensions."""
        return F.mse_loss(own, other)


class HiddenCosine(_Hidden):
    """One minus the cosine of layers' outputs (DistilBERT, Sanh et al. 2019, section 2), the last ones' by default.

    Arguments as :class:`SoftTargets`' but for ``layers``, a map of layers.
    """

    default_layers = Last

    def between(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the mean over tokens."""
        return (1.0 - F.cosine_similarity(own, other, dim=-1)).mean()


class AttentionMaps(_OfLayers):
    """The mean squared difference of attention's scores (TinyBERT, Jiao et al. 2020, section 3, eq. 7).

    As they are before the softmax, and of the pairs of tokens that see each other in both.

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        layers: which layers are compared, every k-th by default.
        weight: factor in the sum.
        begin: share of the run's optimiser steps from which on it counts.
        end: share of the run's optimiser steps up to which it counts.

    Raises:
        MemtxError: heads or layers do not fit, or one of the models has random blocks or a memory.
    """

    def __init__(
        self,
        student: Sizes,
        teacher: Sizes,
        layers: LayerMap | None = None,
        weight: float = 1.0,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, layers, weight, begin, end)
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if not sizes.maps:
                raise MemtxError(
                    f"AttentionMaps compares scores of pairs of tokens, and the {whose}, a {sizes.name}, sees random "
                    "blocks or a memory.",
                    "Use FullAttention or WindowAttention in both, or compare ValueRelations or HiddenMSE instead.",
                )
        if student.heads != teacher.heads:
            raise MemtxError(
                f"The student has {student.heads} heads a layer, the teacher {teacher.heads}; maps are compared "
                "head by head.",
                f"Give the student {teacher.heads}, or compare ValueRelations, which can be cut into other heads.",
            )

    def of_pair(self, student: Shown, teacher: Shown, own: int, other: int) -> Tensor:
        """Return the mean over heads and pairs of tokens."""
        (first, last), (low, high) = student.reach(own), teacher.reach(other)
        first, last, length = max(first, low), min(last, high), student.there.shape[1]

        def part(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
            seen = student.seen(queries, keys) & student.near(own, queries, keys) & teacher.near(other, queries, keys)
            given = wide(teacher.scores(other, queries, keys)).detach()
            difference = wide(student.scores(own, queries, keys)) - given
            return (difference.square() * seen[:, None]).sum(), difference.shape[1] * seen.sum()

        total, count = wide(student.hidden[0]).sum() * 0.0, student.there.new_zeros((), dtype=torch.int64)
        for start in range(0, length, QUERIES):
            stop = min(start + QUERIES, length)
            # What one of the windows does not reach is not made.
            keys = slice(max(start + first, 0), min(stop + last, length))
            lost, pairs = checkpoint(part, slice(start, stop), keys, use_reentrant=False)
            total, count = total + lost, count + pairs
        return total / count.clamp(min=1)


class ValueRelations(_OfLayers):
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

    default_layers = Last

    def __init__(
        self,
        student: Sizes,
        teacher: Sizes,
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
        at_least(1, heads=self.heads)
        for whose, sizes in (("student", student), ("teacher", teacher)):
            if sizes.width % self.heads:
                raise MemtxError(
                    f"The {whose}'s values are {sizes.width} wide, which {self.heads} heads do not divide.",
                    "Choose a divisor of both widths.",
                )

    def of_pair(self, student: Shown, teacher: Shown, own: int, other: int) -> Tensor:
        """Return the mean over heads and tokens, in nats."""
        seen = student.seen()[:, None]
        mine = self._relation(student.values(own), seen)
        theirs = self._relation(teacher.values(other), seen).detach()
        each = torch.where(seen, theirs.exp() * (theirs - mine), 0.0).sum()
        return each / (self.heads * student.there.sum()).clamp(min=1)

    def _relation(self, values: Tensor, seen: Tensor) -> Tensor:
        """Return (rows, heads, length, length), the logarithms of the relation of (rows, length, width) values."""
        x = wide(values).view(*values.shape[:2], self.heads, -1).transpose(1, 2)
        # A finite stand-in: padding relates to nothing, and is not looked at.
        scores = (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(x.dtype).min)
        return F.log_softmax(scores, dim=-1)


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
