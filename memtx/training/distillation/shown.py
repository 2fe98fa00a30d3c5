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

ALL = slice(None)
"""Every place."""


def body_of(model: nn.Module) -> nn.Module:
    """Return what reads: a task's model without its head, any other as it is."""
    return model.body if isinstance(model, TaskModel) else model


@dataclass(frozen=True)
class Sizes:
    """What must fit for two models to be compared.

    Attributes:
        name: the model's class.
        dim: width of the hidden states.
        depth: layers whose hidden states it shows; 0 if it shows none.
        heads: query heads a layer.
        width: of a layer's values, all heads together.
        outputs: scores a place, or a text; 0 if it has no head for what is trained.
        maps: whether the distance of two tokens decides whether one sees the other, so that the scores that attention
            gives pairs can be compared.
    """

    name: str
    dim: int
    depth: int
    heads: int
    width: int
    outputs: int
    maps: bool

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the sizes of a model.

        Raises:
            MemtxError: it is of a kind that neither teaches nor learns from a teacher.
        """
        body = body_of(model)
        name = type(body).__name__
        if isinstance(body, Encoder):
            outputs = model.outputs if isinstance(model, TaskModel) else body.vocab_size * (body.head is not None)
            attentions = [block.attention for block in blocks_of(body)]
            maps = all(one.near(torch.zeros(1, dtype=torch.int64)) is not None for one in attentions)
            return cls(name, body.dim, body.depth, attentions[0].heads, body.dim, outputs, maps)
        if isinstance(model, TaskModel):
            return cls(name, model.body.dim, 0, 0, 0, model.outputs, maps=False)
        if isinstance(body, MemoryTransformer):
            attention = blocks_of(body)[0].attention
            width = attention.heads * attention.head_dim
            return cls(name, body.dim, body.depth, attention.heads, width, body.vocab_size, maps=False)
        raise MemtxError(
            f"A {name} can be no teacher and no student.", "Give an Encoder, a task's model or a MemoryTransformer."
        )


def blocks_of(model: nn.Module) -> list[Any]:
    """Return the layers of an encoder, of a task's encoder or of a memory transformer; none of other models."""
    body = body_of(model)
    return list(body.blocks) if isinstance(body, Encoder | MemoryTransformer) else []


@dataclass(frozen=True)
class Shown:
    """What one model makes of rows of text.

    Attributes:
        states: (n, width), one for each place, or text, that is scored.
        head: makes (m, classes) scores of (m, width) of the states; None where the states are scores.
        index: (n, width) int64, the class of each score, where the states are those of some classes alone; a score of
            minus infinity fills up.
        hidden: (rows, length, dim) each, what the embeddings made and what every layer made.
        blocks: the layers.
        present: (rows, length) bool, where a token is and no padding; None for everywhere.
        marked: (rows, length) bool, which tokens are global; None where none is.
        starts: of a model that sees the past alone, (rows, length) bool, where a document begins; None of others.
        loss: what the student loses by the labels, a scalar; None of a teacher.
    """

    states: Tensor | None
    head: Callable[[Tensor], Tensor] | None = None
    index: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    blocks: Sequence[Any] = ()
    present: Tensor | None = None
    marked: Tensor | None = None
    starts: Tensor | None = None
    loss: Tensor | None = None

    def scores(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return (rows, heads, queries, keys) of a layer, before masks and softmax."""
        out: Tensor = self.blocks[layer].attention.scores(self.hidden[layer], queries, keys)
        return out

    def values(self, layer: int) -> Tensor:
        """Return (rows, length, heads * head_dim) of a layer."""
        out: Tensor = self.blocks[layer].values(self.hidden[layer])
        return out

    def near(self, layer: int, queries: slice, keys: slice) -> Tensor:
        """Return (rows or 1, queries, keys) bool, which places each place sees in a layer.

        Global tokens' own rows are left out: they ask with projections of their own.
        """
        place = torch.arange(self.hidden[0].shape[1], device=self.hidden[0].device)
        found: Tensor = self.blocks[layer].attention.near(place[keys] - place[queries, None])[None]
        return found if self.marked is None else found & ~self.marked[:, queries, None]

    def reach(self, layer: int) -> tuple[int, int]:
        """Return the least and the greatest distance at which a place sees another in a layer."""
        length = self.hidden[0].shape[1]
        distance = torch.arange(1 - length, length)
        seen = distance[self.blocks[layer].attention.near(distance)]
        return int(seen[0]), int(seen[-1])

    @property
    def there(self) -> Tensor:
        """(rows, length) bool, where a token is."""
        x = self.hidden[0]
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if self.present is None else self.present

    def seen(self, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """Return (rows, queries, keys) bool, which places each place may be compared with."""
        pairs = self.there[:, queries, None] & self.there[:, None, keys]
        if self.starts is None:
            return pairs
        place, document = torch.arange(self.starts.shape[1], device=self.starts.device), self.starts.cumsum(1)
        past = place[queries, None] >= place[keys]
        return pairs & past & (document[:, queries, None] == document[:, None, keys])
