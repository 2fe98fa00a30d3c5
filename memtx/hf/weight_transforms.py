"""A checkpoint's tensor as rows of the model's own: joined, turned round, rotary pairs put side by side; and back.

Rows are only moved, so what is written is what was read, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.hf.lazy_tensors import LazyTensor, iter_chunks


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows of one of the model's tensors.

    Attributes:
        name: the tensor's name.
        start: the first row.
        num_rows: how many; None for all that follow.
        rotary_heads: heads whose rotary pairs the checkpoint keeps as (i, i + head_dim / 2) and the model as (2i, 2i +
            1); 0 where rows stand in the same order.
    """

    name: str
    start: int = 0
    num_rows: int | None = None
    rotary_heads: int = 0

    def select(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the rows as the model has them."""
        return weights[self.name][self.start : None if self.num_rows is None else self.start + self.num_rows]


@dataclass(frozen=True)
class WeightTransform:
    """A tensor of the checkpoint.

    Attributes:
        slices: where its rows stand in the model, in order.
        transposed: whether the checkpoint keeps (into, out) where the model keeps (out, into).
    """

    slices: tuple[RowSlice, ...]
    transposed: bool = False

    @classmethod
    def from_rows(
        cls, name: str, start: int = 0, num_rows: int | None = None, rotary_heads: int = 0
    ) -> WeightTransform:
        """Return the piece of consecutive rows of one tensor."""
        return cls((RowSlice(name, start, num_rows, rotary_heads),))

    def checkpoint_shape(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the shape in the checkpoint."""
        first, *others = (each.select(weights) for each in self.slices)
        shape = (first.shape[0] + sum(each.shape[0] for each in others), *first.shape[1:]) if first.dim() else ()
        return shape[::-1] if self.transposed else shape

    def export(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor as the checkpoint keeps it."""
        if self.slices[0] == RowSlice(self.slices[0].name) and len(self.slices) == 1:
            out = weights[self.slices[0].name]  # of any dimension
        else:
            out = torch.cat([_deinterleave_rotary(each.select(weights), each.rotary_heads) for each in self.slices])
        return out.mT if self.transposed else out

    def load_into(self, weights: Mapping[str, Tensor], tensor: LazyTensor) -> None:
        """Read the checkpoint's tensor into the model's own."""
        if self.transposed:
            self._load_transposed(weights, tensor)
            return
        first = 0
        for each in self.slices:
            target = each.select(weights)
            tensor.read_into(target, first)
            if each.rotary_heads:
                # Head by head: what is copied beside the weights stays small.
                for head in target.chunk(each.rotary_heads):
                    head.copy_(_interleave_rotary(head))
            first += target.shape[0]

    def _load_transposed(self, weights: Mapping[str, Tensor], tensor: LazyTensor) -> None:
        column = 0
        for part in iter_chunks(tensor):
            row, stop = 0, column + part.shape[0]
            for each in self.slices:
                target = each.select(weights)
                target[:, column:stop] = part[:, row : row + target.shape[0]].mT
                row += target.shape[0]
            column = stop


def _interleave_rotary(head: Tensor) -> Tensor:
    """(head_dim, ...) in halves -> in pairs."""
    return torch.stack(head.chunk(2), dim=1).flatten(0, 1)


def _deinterleave_rotary(x: Tensor, heads: int) -> Tensor:
    """(heads * head_dim, ...) in pairs -> in halves; unchanged where heads is 0."""
    if not heads:
        return x
    return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).flatten(0, 2)
