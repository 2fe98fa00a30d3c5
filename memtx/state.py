"""The state of a stream as a value: a frozen tree of tensors that no module keeps.

Two rules make every operation below work for every kind of memory: axis 0 of every leaf is the row, and a
leaf of zeros is a fresh stream.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import files
from memtx.errors import CheckpointError, MemtxError

C = TypeVar("C")

FORMAT_VERSION = 2


@dataclass_transform(frozen_default=True)
def state_dataclass(cls: type[C]) -> type[C]:
    """Make ``cls`` a frozen dataclass and a pytree node whose key paths are its field names."""
    made = dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]

    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, name) for name in names], None

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(children: Any, _: Any) -> Any:
        return made(**dict(zip(names, children, strict=True)))

    pytree.register_pytree_node(
        made,
        flatten,
        unflatten,
        serialized_type_name=f"{made.__module__}.{made.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return made


@state_dataclass
class MemoryState:
    """All that a model carries from one segment to the next, for every row.

    Attributes:
        position: (rows,) int64, tokens of each row's document read so far.
        layers: one tuple a layer, holding one state a memory of that layer.
    """

    position: Tensor
    layers: tuple[tuple[Any, ...], ...]

    @property
    def batch_size(self) -> int:
        """Streams in the batch."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(self))

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """Return the state with ``function`` applied to every tensor."""
        mapped: MemoryState = pytree.tree_map(function, self)
        return mapped

    def detach(self) -> MemoryState:
        """Return the state cut from the graph: the end of a truncation horizon."""
        return self.map(torch.Tensor.detach)

    def reset(self, mask: Tensor) -> MemoryState:
        """Return the state with the marked rows fresh.

        Args:
            mask: (rows,) bool, True for the rows to reset.

        Raises:
            MemtxError: ``mask`` is not a bool tensor of this shape.
        """
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            raise MemtxError(
                f"reset got {mask.dtype} {tuple(mask.shape)}, expected a bool tensor of shape ({self.batch_size},).",
                "Mark with True the rows to reset.",
            )
        return self.map(lambda leaf: leaf.masked_fill(mask.to(leaf.device).view(-1, *[1] * (leaf.dim() - 1)), 0))

    def select(self, indices: Sequence[int] | Tensor) -> MemoryState:
        """Return the given rows, in the given order.

        Args:
            indices: indices from 0; one may stand twice.

        Raises:
            MemtxError: a mask was given, or an index is out of range.
        """
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool or index.is_floating_point() or index.dim() != 1:
            raise MemtxError(
                f"select got {index.dtype} {tuple(index.shape)}, expected a list of row numbers.",
                "For a mask, give mask.nonzero().flatten().",
            )
        # Numbers on an accelerator are checked by its own kernel: looking at them here would wait for it.
        if index.device.type == "cpu" and index.numel() and not 0 <= index.min() <= index.max() < self.batch_size:
            raise MemtxError(
                f"select got {index.tolist()} of {self.batch_size} rows.", f"Give 0 to {self.batch_size - 1}."
            )
        index = index.to(torch.int64)
        return self.map(lambda leaf: leaf.index_select(0, index.to(leaf.device)))

    @staticmethod
    def concat(states: Sequence[MemoryState]) -> MemoryState:
        """Join the rows of several states of one model.

        Raises:
            MemtxError: no state was given, or they are not of one model.
        """
        if not states:
            raise MemtxError("concat got no state, expected at least one.")
        flat = [pytree.tree_flatten(one) for one in states]
        shapes = [[(leaf.shape[1:], leaf.dtype) for leaf in leaves] for leaves, _ in flat]
        if any(spec != flat[0][1] for _, spec in flat) or any(one != shapes[0] for one in shapes):
            raise MemtxError("concat got states of different structures.", "Join states of one model only.")
        leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
        joined: MemoryState = pytree.tree_unflatten(leaves, flat[0][1])
        return joined

    def equals(self, other: MemoryState, atol: float = 0.0) -> bool:
        """Return whether two states are of one structure and no number differs by more than ``atol``."""
        mine, theirs = self.named_tensors(), other.named_tensors()
        return mine.keys() == theirs.keys() and all(
            own.shape == theirs[name].shape
            and own.dtype == theirs[name].dtype
            and torch.allclose(own, theirs[name].to(own.device), rtol=0.0, atol=atol)
            for name, own in mine.items()
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Return the state on a device, its floating-point tensors in a dtype."""
        return self.map(lambda leaf: leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its key path, such as ``layers[0][0].hidden``."""
        leaves, _ = pytree.tree_flatten_with_path(self)
        return {pytree.keystr(path).lstrip("."): leaf for path, leaf in leaves}

    def with_named_tensors(self, tensors: Mapping[str, Tensor]) -> MemoryState:
        """Return a state of this structure that holds ``tensors``; the rows may differ from this one's.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape or dtype does not fit.
        """
        own = self.named_tensors()
        if missing := sorted(own.keys() - tensors.keys()):
            raise CheckpointError(f"The saved state lacks {missing[0]}.", "It belongs to another model.")
        if extra := sorted(tensors.keys() - own.keys()):
            raise CheckpointError(f"The saved state has {extra[0]}, unknown here.", "It belongs to another model.")
        rows = {tensors[name].shape[0] if tensors[name].dim() else -1 for name in own}
        for name, tensor in own.items():
            given = tensors[name]
            if given.shape[1:] != tensor.shape[1:] or given.dtype != tensor.dtype or len(rows) != 1 or -1 in rows:
                raise CheckpointError(
                    f"The saved state's {name} is {given.dtype} {tuple(given.shape)}, "
                    f"expected {tensor.dtype} (rows, {', '.join(map(str, tensor.shape[1:]))}).",
                    "It belongs to another model.",
                )
        _, spec = pytree.tree_flatten(self)
        leaves = [tensors[name].to(tensor.device) for name, tensor in own.items()]
        filled: MemoryState = pytree.tree_unflatten(leaves, spec)
        return filled

    def save(self, path: str | os.PathLike[str], fingerprint: str, **metadata: str) -> None:
        """Write the state as one safetensors file.

        Args:
            path: the file to write, whole or not at all.
            fingerprint: the model's, so that no other model takes the state for its own.
            metadata: further texts for the header.
        """
        files.save_tensors(
            path, self.named_tensors(), kind="memtx.state", version=FORMAT_VERSION, fingerprint=fingerprint, **metadata
        )

    @staticmethod
    def load(path: str | os.PathLike[str], *, like: MemoryState, fingerprint: str) -> MemoryState:
        """Read a state saved by the same model.

        Args:
            path: the file.
            like: any state of the model, for example ``model.init_state(1)``; gives structure and device.
            fingerprint: the model's.

        Raises:
            CheckpointError: the file is damaged, of another format, or of another model.
        """
        tensors, header = files.load_tensors(path, kind="memtx.state", version=FORMAT_VERSION)
        if header.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"'{path}' is the state of another model ({header.get('fingerprint', 'none')[:12]}, "
                f"this one is {fingerprint[:12]}).",
                "Load it with the checkpoint that wrote it.",
            )
        return like.with_named_tensors(tensors)
