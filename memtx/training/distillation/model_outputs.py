"""What a model shows of a text it has read: all that the losses compare of a student and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer

ALL_POSITIONS = slice(None)
"""Every place."""


def get_backbone(model: nn.Module) -> nn.Module:
    """Return what reads: a task's model without its head, any other as it is."""
    return model.backbone if isinstance(model, TaskModel) else model


@dataclass(frozen=True)
class ModelDims:
    """What must fit for two models to be compared.

    Attributes:
        name: the model's class.
        dim: width of the hidden states.
        depth: layers whose hidden states it shows; 0 if it shows none.
        heads: query heads a layer.
        value_dim: of a layer's values, all heads together.
        num_classes: scores a place, or a text; 0 if it has no head for what is trained.
        has_attention_maps: whether the distance of two tokens decides whether one sees the other, so that the scores
            that attention gives pairs can be compared.
    """

    name: str
    dim: int
    depth: int
    heads: int
    value_dim: int
    num_classes: int
    has_attention_maps: bool

    @classmethod
    def from_model(cls, model: nn.Module) -> Self:
        """Return the sizes of a model.

        Raises:
            MemtxError: it is of a kind that neither teaches nor learns from a teacher.
        """
        body = get_backbone(model)
        name = type(body).__name__
        if isinstance(body, Encoder):
            outputs = model.num_labels if isinstance(model, TaskModel) else body.vocab_size * (body.head is not None)
            attentions = [block.attention for block in get_blocks(body)]
            maps = all(one.within_window(torch.zeros(1, dtype=torch.int64)) is not None for one in attentions)
            return cls(name, body.dim, body.depth, attentions[0].heads, body.dim, outputs, maps)
        if isinstance(model, TaskModel):
            return cls(name, model.backbone.dim, 0, 0, 0, model.num_labels, has_attention_maps=False)
        if isinstance(body, MemoryTransformer):
            attention = get_blocks(body)[0].attention
            width = attention.heads * attention.head_dim
            return cls(name, body.dim, body.depth, attention.heads, width, body.vocab_size, has_attention_maps=False)
        raise MemtxError(
            f"A {name} can be no teacher and no student.", "Give an Encoder, a task's model or a MemoryTransformer."
        )


def get_blocks(model: nn.Module) -> list[Any]:
    """Return the layers of an encoder, of a task's encoder or of a memory transformer; none of other models."""
    body = get_backbone(model)
    return list(body.blocks) if isinstance(body, Encoder | MemoryTransformer) else []


@dataclass(frozen=True)
class ModelOutputs:
    """What one model makes of rows of text.

    Attributes:
        features: (n, width), one for each place, or text, that is scored.
        head: makes (m, classes) scores of (m, width) of the states; None where the states are scores.
        class_indices: (n, width) int64, the class of each score, where the states are those of some classes alone; a
            score of minus infinity fills up.
        hidden_states: (rows, length, dim) each, what the embeddings made and what every layer made.
        blocks: the layers.
        attention_mask: (rows, length) bool, where a token is and no padding; None for everywhere.
        global_attention_mask: (rows, length) bool, which tokens are global; None where none is.
        document_starts: of a model that sees the past alone, (rows, length) bool, where a document begins; None of
            others.
        loss: what the student loses by the labels, a scalar; None of a teacher.
    """

    features: Tensor | None
    head: Callable[[Tensor], Tensor] | None = None
    class_indices: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    blocks: Sequence[Any] = ()
    attention_mask: Tensor | None = None
    global_attention_mask: Tensor | None = None
    document_starts: Tensor | None = None
    loss: Tensor | None = None

    def attention_scores(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return (rows, heads, queries, keys) of a layer, before masks and softmax."""
        out: Tensor = self.blocks[layer].attention.attention_scores(self.hidden_states[layer], queries, keys)
        return out

    def values(self, layer: int) -> Tensor:
        """Return (rows, length, heads * head_dim) of a layer."""
        out: Tensor = self.blocks[layer].project_values(self.hidden_states[layer])
        return out

    def window_mask(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return (rows or 1, queries, keys) bool, which places each place sees in a layer.

        Global tokens' own rows are left out: they ask with projections of their own.
        """
        place = torch.arange(self.hidden_states[0].shape[1], device=self.hidden_states[0].device)
        found: Tensor = self.blocks[layer].attention.within_window(place[keys] - place[queries, None])[None]
        return found if self.global_attention_mask is None else found & ~self.global_attention_mask[:, queries, None]

    def distance_range(self, layer: int) -> tuple[int, int]:
        """Return the least and the greatest distance at which a place sees another in a layer."""
        length = self.hidden_states[0].shape[1]
        distance = torch.arange(1 - length, length)
        seen = distance[self.blocks[layer].attention.within_window(distance)]
        return int(seen[0]), int(seen[-1])

    @property
    def token_mask(self) -> Tensor:
        """(rows, length) bool, where a token is."""
        x = self.hidden_states[0]
        return (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if self.attention_mask is None
            else self.attention_mask
        )

    def pair_mask(self, queries: slice = ALL_POSITIONS, keys: slice = ALL_POSITIONS) -> Tensor:
        """Return (rows, queries, keys) bool, which places each place may be compared with."""
        pairs = self.token_mask[:, queries, None] & self.token_mask[:, None, keys]
        if self.document_starts is None:
            return pairs
        place, document = (
            torch.arange(self.document_starts.shape[1], device=self.document_starts.device),
            self.document_starts.cumsum(1),
        )
        past = place[queries, None] >= place[keys]
        return pairs & past & (document[:, queries, None] == document[:, None, keys])
