"""Distillation losses of pairs of layers: hidden states, attention scores and value relations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtx.errors import MemtxError, check_at_least
from memtx.training.distillation.layer_map import EveryKthLayer, LastLayer, LayerMap
from memtx.training.distillation.losses import DistillationLoss, upcast
from memtx.training.distillation.model_outputs import ModelDims, ModelOutputs

QUERY_CHUNK_SIZE = 128
"""Queries whose attention scores are in memory at a time, for student and teacher."""


class LayerwiseLoss(DistillationLoss):
    """Sum of the losses of pairs of layers, each with weight 1 (TinyBERT, Jiao et al. 2020, section 3, eq. 11).

    Args:
        student: Dimensions of the student.
        teacher: Dimensions of the teacher.
        layers: Pairs of layers to compare. Defaults to ``default_layers`` of the class.
        **options: ``weight``, ``begin`` and ``end`` of :class:`DistillationLoss`.

    Raises:
        MemtxError: A number is out of range, or the models do not fit each other or the map.
    """

    default_layers: ClassVar[type[LayerMap]] = EveryKthLayer

    def __init__(
        self, student: ModelDims, teacher: ModelDims, layers: LayerMap | None = None, **options: float
    ) -> None:
        super().__init__(student, teacher, **options)
        self.layer_pairs = (layers or self.default_layers()).pairs(student.depth, teacher.depth)
        if not self.layer_pairs:
            raise MemtxError(
                f"{type(self).__name__} compares layers, but its layer map has none.",
                "Use EveryKthLayer, ExplicitLayers or LastLayer.",
            )
        self.check_layers(student, teacher)

    def check_layers(self, student: ModelDims, teacher: ModelDims) -> None:
        """Raise MemtxError unless the loss can compare the layers of every pair; by default it can."""

    @abstractmethod
    def compare_layers(self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]) -> Tensor:
        """Return the loss of a (student layer, teacher layer) pair, ``()``."""

    def forward(self, student: ModelOutputs, teacher: ModelOutputs) -> Tensor:
        """Return the sum over pairs of layers."""
        losses = [self.compare_layers(student, teacher, layers) for layers in self.layer_pairs]
        return torch.stack(losses).sum()


def check_heads(student: ModelDims, teacher: ModelDims, layer_pairs: Sequence[tuple[int, int]]) -> None:
    """Raise MemtxError unless both layers of every pair have equally many heads."""
    for pair in layer_pairs:
        mine, others = student.heads[pair[0]], teacher.heads[pair[1]]
        if mine != others:
            raise MemtxError(
                f"Layer {pair[0]} of the student has {mine} heads, layer {pair[1]} of the teacher {others}, which are "
                "compared one by one.",
                f"Use {others} heads in the student, or ValueRelations with heads that divide both widths.",
            )


class HiddenMSE(LayerwiseLoss):
    """Mean squared difference of layer outputs, by default each k-th (TinyBERT, Jiao et al. 2020, section 3, eq. 8)."""

    has_projection = True

    def compare_layers(self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]) -> Tensor:
        """Return the mean over tokens and dimensions."""
        return F.mse_loss(*self.aligned_hidden(student, teacher, layers))


class HiddenCosine(LayerwiseLoss):
    """One minus the cosine of layer outputs, by default the last (DistilBERT, Sanh et al. 2019, section 2)."""

    has_projection = True
    default_layers = LastLayer

    def compare_layers(self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]) -> Tensor:
        """Return the mean over tokens."""
        hidden = self.aligned_hidden(student, teacher, layers)
        return (1.0 - F.cosine_similarity(*hidden, dim=-1)).mean()


class AttentionMSE(LayerwiseLoss):
    """Mean squared difference of attention scores (TinyBERT, Jiao et al. 2020, section 3, eq. 7).

    Compares the scores before the softmax of pairs of tokens that are visible in both models. Arguments as for
    :class:`LayerwiseLoss`; ``layers`` defaults to every k-th layer.

    Raises:
        MemtxError: The heads or layers do not match, or a model has random blocks or a memory.
    """

    def check_dims(self, student: ModelDims, teacher: ModelDims) -> None:
        """Raise MemtxError unless both models have comparable attention scores."""
        super().check_dims(student, teacher)
        for name, dims in (("student", student), ("teacher", teacher)):
            if not dims.has_attention_maps:
                raise MemtxError(
                    f"AttentionMSE compares scores of token pairs, but the {name} ({dims.name}) attends to random "
                    "blocks or a memory.",
                    "Use FullAttention or LongformerAttention in both, or compare ValueRelations or HiddenMSE instead.",
                )

    def check_layers(self, student: ModelDims, teacher: ModelDims) -> None:
        """Raise MemtxError unless both layers of every pair have equally many heads."""
        check_heads(student, teacher, self.layer_pairs)

    def compare_layers(self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]) -> Tensor:
        """Return the mean over heads and pairs of tokens."""
        student_layer, teacher_layer = layers
        ranges = (student.distance_range(student_layer), teacher.distance_range(teacher_layer))
        nearest, farthest = max(low for low, _ in ranges), min(high for _, high in ranges)
        length = student.token_mask.shape[1]

        def squared_error(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
            visible = (
                student.pair_mask(queries, keys)
                & student.window_mask(student_layer, queries, keys)
                & teacher.window_mask(teacher_layer, queries, keys)
            )
            target = upcast(teacher.attention_scores(teacher_layer, queries, keys)).detach()
            difference = upcast(student.attention_scores(student_layer, queries, keys)) - target
            return (difference.square() * visible[:, None]).sum(), difference.shape[1] * visible.sum()

        total, count = upcast(student.hidden_states[0]).sum() * 0.0, student.token_mask.new_zeros((), dtype=torch.int64)
        for start in range(0, length, QUERY_CHUNK_SIZE):
            stop = min(start + QUERY_CHUNK_SIZE, length)
            # Keys outside both windows are not computed.
            keys = slice(max(start + nearest, 0), min(stop + farthest, length))
            error, pairs = checkpoint(squared_error, slice(start, stop), keys, use_reentrant=False)
            total, count = total + error, count + pairs
        return total / count.clamp(min=1)


class ValueRelations(LayerwiseLoss):
    """Divergence of softmax(V V' / sqrt(head_dim)) (MiniLM, Wang et al. 2020, section 3.2, eq. 6).

    In decoders, tokens relate to themselves and to earlier tokens of their document in the same segment. Arguments not
    listed are those of :class:`LayerwiseLoss`; ``layers`` defaults to the last layers.

    Args:
        heads: Heads to split the values into (MiniLMv2, Wang et al. 2021, section 3.2). None means the layers' own.

    Raises:
        MemtxError: The heads or layers do not match.
    """

    default_layers = LastLayer

    def __init__(
        self,
        student: ModelDims,
        teacher: ModelDims,
        layers: LayerMap | None = None,
        heads: int | None = None,
        **options: float,
    ) -> None:
        super().__init__(student, teacher, layers, **options)
        if heads is None:
            check_heads(student, teacher, self.layer_pairs)
        else:
            check_at_least(1, heads=heads)
        self.heads = {pair: heads or student.heads[pair[0]] for pair in self.layer_pairs}
        for pair, count in self.heads.items():
            for name, dims, layer in zip(("student", "teacher"), (student, teacher), pair, strict=True):
                if dims.value_dims[layer] % count:
                    raise MemtxError(
                        f"The {name}'s value width ({dims.value_dims[layer]}) is not divisible by heads ({count}).",
                        "Choose a divisor of both widths.",
                    )

    def compare_layers(self, student: ModelOutputs, teacher: ModelOutputs, layers: tuple[int, int]) -> Tensor:
        """Return the mean over heads and tokens in nats."""
        mask = student.pair_mask()[:, None]
        heads = self.heads[layers]
        log_probs = self._log_relations(student.values(layers[0]), heads, mask)
        log_target = self._log_relations(teacher.values(layers[1]), heads, mask).detach()
        total = torch.where(mask, log_target.exp() * (log_target - log_probs), 0.0).sum()
        return total / (heads * student.token_mask.sum()).clamp(min=1)

    def _log_relations(self, values: Tensor, heads: int, mask: Tensor) -> Tensor:
        """Return log relations ``(batch, heads, length, length)`` of ``(batch, length, value_dim)`` values."""
        x = upcast(values).view(*values.shape[:2], heads, -1).transpose(1, 2)
        # The fill value is finite, because a padded query has no unmasked key; its relations are masked out later.
        scores = (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~mask, torch.finfo(x.dtype).min)
        return F.log_softmax(scores, dim=-1)
