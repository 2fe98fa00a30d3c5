"""Mapping between a checkpoint's tensors and a model's: names, and rows that are joined, transposed or permuted.

Rows are only moved, so saving a loaded model gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtx.hf.checkpoint import LazyTensor, iter_chunks


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows of a model's tensor.

    Attributes:
        name: Name of the tensor.
        start: First row.
        num_rows: Number of rows; None for all remaining rows.
        rotary_heads: Number of heads whose rotary pairs are (i, i + rotary_dim / 2) in the checkpoint and (2i, 2i + 1)
            in the model; 0 if both have the same order.
        rotary_dim: Leading rows of each head that are rotated; None for all.
        index: Index of the matrix in a three-dimensional tensor, such as an expert's; None for a tensor of matrices.
    """

    name: str
    start: int = 0
    num_rows: int | None = None
    rotary_heads: int = 0
    rotary_dim: int | None = None
    index: int | None = None

    def select(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the rows in the model's order, as a view."""
        tensor = weights[self.name] if self.index is None else weights[self.name][self.index]
        return tensor[self.start : None if self.num_rows is None else self.start + self.num_rows]


@dataclass(frozen=True)
class WeightTransform:
    """A checkpoint's tensor in terms of the model's tensors.

    Attributes:
        slices: The tensor's rows in the model, in order.
        transposed: If True, the checkpoint stores ``(in, out)`` and the model ``(out, in)``.
        last_dims: Last dimensions in the checkpoint, of heads and their width, which are one in the model; empty if
            both have the same.
    """

    slices: tuple[RowSlice, ...]
    transposed: bool = False
    last_dims: tuple[int, ...] = ()

    @property
    def _is_copy(self) -> bool:
        """True if the checkpoint's tensor is a tensor of the model, of any dimension."""
        return self.slices == (RowSlice(self.slices[0].name),) and not self.transposed and not self.last_dims

    def checkpoint_shape(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the shape in the checkpoint."""
        if self._is_copy:
            return tuple(weights[self.slices[0].name].shape)
        parts = [part.select(weights) for part in self.slices]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        shape = shape[::-1] if self.transposed else shape
        return (*shape[:-1], *self.last_dims) if self.last_dims else shape

    def export(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor as the checkpoint stores it."""
        if self.slices == (RowSlice(self.slices[0].name),):
            out = weights[self.slices[0].name]  # of any dimension
        else:
            out = torch.cat(
                [_deinterleave_rotary(part.select(weights), part.rotary_heads, part.rotary_dim) for part in self.slices]
            )
        out = out.mT if self.transposed else out
        return out.reshape(*out.shape[:-1], *self.last_dims) if self.last_dims else out

    def load_into(self, weights: Mapping[str, Tensor], tensor: LazyTensor) -> None:
        """Read the checkpoint's tensor into the model's tensors."""
        if self.transposed:
            self._load_transposed(weights, tensor)
            return
        if self._is_copy:
            tensor.read_into(weights[self.slices[0].name])
            return
        start = 0
        for part in self.slices:
            target = part.select(weights)
            tensor.read_into(target.view(len(target), *self.last_dims) if self.last_dims else target, start)
            if part.rotary_heads:
                # One head at a time, so that the copies stay small.
                for head in target.chunk(part.rotary_heads):
                    rotated = head[: part.rotary_dim]
                    rotated.copy_(_interleave_rotary(rotated))
            start += target.shape[0]

    def _load_transposed(self, weights: Mapping[str, Tensor], tensor: LazyTensor) -> None:
        column = 0
        for chunk in iter_chunks(tensor):
            chunk = chunk.flatten(1)
            row, end = 0, column + chunk.shape[0]
            for part in self.slices:
                target = part.select(weights)
                target[:, column:end] = chunk[:, row : row + target.shape[0]].mT
                row += target.shape[0]
            column = end


def _interleave_rotary(head: Tensor) -> Tensor:
    """Reorder ``(head_dim, ...)`` from halves to pairs."""
    return torch.stack(head.chunk(2), dim=1).flatten(0, 1)


def _deinterleave_rotary(x: Tensor, heads: int, rotary_dim: int | None) -> Tensor:
    """Reorder the rotated rows of each head of ``(heads * head_dim, ...)`` from pairs to halves, if there are heads."""
    if not heads:
        return x
    per_head = x.view(heads, -1, *x.shape[1:])
    rotated, unrotated = per_head[:, :rotary_dim], per_head[:, per_head[:, :rotary_dim].shape[1] :]
    rotated = rotated.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).flatten(1, 2)
    return torch.cat([rotated, unrotated], dim=1).flatten(0, 1)


WeightEntry = tuple[WeightTransform, Sequence[str]]
"""A tensor of the checkpoint and its possible names there, in order of preference."""


@dataclass(frozen=True)
class KeyMapping:
    """Names of tensors in a layout.

    Attributes:
        hf_keys: Parameter or module of the model -> possible names in the checkpoint, in order of preference, without
            prefix. ``{}`` stands for an index, such as a layer's.
        prefix: Prefix of the backbone's names in a checkpoint that also holds a head.
        head_prefixes: Prefixes of the heads' names, which never have ``prefix``.
        extra_patterns: Patterns of names (without prefix) that the layout may have but the model does not use.
        legacy_suffixes: Old suffix of a name -> its current form.
    """

    hf_keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prefix: str = ""
    head_prefixes: tuple[str, ...] = ()
    extra_patterns: Sequence[str] = ()
    legacy_suffixes: Mapping[str, str] = field(default_factory=dict)

    def normalize_key(self, key: str) -> str:
        """Return a checkpoint's name as in ``hf_keys``: without prefix, in its current form."""
        key = key.removeprefix(self.prefix)
        for old, new in self.legacy_suffixes.items():
            if key.endswith(old):
                return key.removesuffix(old) + new
        return key

    def is_extra(self, key: str) -> bool:
        """Return whether the model does not use a normalized name of the layout."""
        return any(re.fullmatch(pattern, key) for pattern in self.extra_patterns)

    def has_any(self, names: Iterable[str], *prefixes: str) -> bool:
        """Return whether any normalized name has one of these prefixes."""
        return any(self.normalize_key(name).startswith(prefixes) for name in names)

    def candidate_keys(self, parameter_name: str) -> list[str]:
        """Return the possible normalized names of a model's parameter in the checkpoint."""
        indices = re.findall(r"(?<=\.)\d+(?=\.|$)", parameter_name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", parameter_name)
        module, _, leaf = pattern.rpartition(".")
        if parameter_name in self.hf_keys:
            return list(self.hf_keys[parameter_name])
        if pattern in self.hf_keys:
            return [key.format(*indices) for key in self.hf_keys[pattern]]
        assert module in self.hf_keys, f"the layout does not say where {parameter_name} is stored"
        return [f"{key.format(*indices)}.{leaf}" for key in self.hf_keys[module]]

    def entries(self, parameter_names: Collection[str]) -> list[WeightEntry]:
        """Return one entry per parameter of the model; a ``key_value`` is stored together with its ``query``."""
        entries: list[WeightEntry] = []
        for name in parameter_names:
            if ".attention.key_value." not in name:
                names = dict.fromkeys([name, name.replace(".attention.query.", ".attention.key_value.")])
                slices = tuple(RowSlice(part) for part in names if part in parameter_names)
                entries.append((WeightTransform(slices), self.candidate_keys(name)))
        return entries
