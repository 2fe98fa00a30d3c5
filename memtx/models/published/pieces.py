"""A checkpoint's tensor as rows of the model's own: joined, turned round, rotary pairs put side by side; and back.

Rows are only moved, so what is written is what was read, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.models.published.stored import Stored, chunks


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one of the model's tensors.

    Attributes:
        own: the tensor's name.
        start: the first row.
        count: how many; None for all that follow.
        heads: heads whose rotary pairs the checkpoint keeps as (i, i + head_dim / 2) and the model as (2i, 2i + 1);
            0 where rows stand in the same order.
    """

    own: str
    start: int = 0
    count: int | None = None
    heads: int = 0

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the rows as the model has them."""
        return weights[self.own][self.start : None if self.count is None else self.start + self.count]


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint.

    Attributes:
        rows: where its rows stand in the model, in order.
        transposed: whether the checkpoint keeps (into, out) where the model keeps (out, into).
    """

    rows: tuple[Rows, ...]
    transposed: bool = False

    @classmethod
    def of(cls, own: str, start: int = 0, count: int | None = None, heads: int = 0) -> Piece:
        """Return the piece of consecutive rows of one tensor."""
        return cls((Rows(own, start, count, heads),))

    def shape(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the shape in the checkpoint."""
        first, *others = (each.of(weights) for each in self.rows)
        shape = (first.shape[0] + sum(each.shape[0] for each in others), *first.shape[1:]) if first.dim() else ()
        return shape[::-1] if self.transposed else shape

    def taken(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor as the checkpoint keeps it."""
        if self.rows[0] == Rows(self.rows[0].own) and len(self.rows) == 1:
            out = weights[self.rows[0].own]  # of any dimension
        else:
            out = torch.cat([_in_halves(each.of(weights), each.heads) for each in self.rows])
        return out.mT if self.transposed else out

    def fill(self, weights: Mapping[str, Tensor], stored: Stored) -> None:
        """Read the checkpoint's tensor into the model's own."""
        if self.transposed:
            self._turn(weights, stored)
            return
        first = 0
        for each in self.rows:
            target = each.of(weights)
            stored.fill(target, first)
            if each.heads:
                # Head by head: what is copied beside the weights stays small.
                for head in target.chunk(each.heads):
                    head.copy_(_in_pairs(head))
            first += target.shape[0]

    def _turn(self, weights: Mapping[str, Tensor], stored: Stored) -> None:
        column = 0
        for part in chunks(stored):
            row, stop = 0, column + part.shape[0]
            for each in self.rows:
                target = each.of(weights)
                target[:, column:stop] = part[:, row : row + target.shape[0]].mT
                row += target.shape[0]
            column = stop


def _in_pairs(head: Tensor) -> Tensor:
    """(head_dim, ...) in halves -> in pairs."""
    return torch.stack(head.chunk(2), dim=1).flatten(0, 1)


def _in_halves(x: Tensor, heads: int) -> Tensor:
    """(heads * head_dim, ...) in pairs -> in halves; unchanged where heads is 0."""
    if not heads:
        return x
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).flatten(0, 2)
