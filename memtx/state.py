"""The state of a stream as a value: an immutable tree of tensors, stored outside the modules.

Two rules make every operation below work for every kind of memory: dimension 0 of every leaf is the batch, and a fresh
stream is all zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import files
from memtx.errors import CheckpointError, MemtxError
from memtx.state_compression import compress_tensors, decompress_tensors

C = TypeVar("C")

FORMAT_VERSION = 2


@dataclass_transform(frozen_default=True)
def state_dataclass(cls: type[C]) -> type[C]:
    """Make ``cls`` a frozen dataclass and a pytree node whose key paths are its field names."""
    node = dataclass(frozen=True)(cls)
    pytree.register_dataclass(node, serialized_type_name=f"{node.__module__}.{node.__qualname__}")
    return node


@state_dataclass
class MemoryState:
    """Everything a model carries from one segment to the next, for a batch of streams.

    Attributes:
        position: ``(batch,)`` int64, number of tokens read so far in each open document.
        layers: One tuple per layer, with one state per memory in that layer.
    """

    position: Tensor
    layers: tuple[tuple[Any, ...], ...]

    @property
    def batch_size(self) -> int:
        """Number of streams."""
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(self))

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """Apply ``function`` to every tensor."""
        return cast(MemoryState, pytree.tree_map(function, self))

    def detach(self) -> MemoryState:
        """Detach every tensor from the graph, as truncated back-propagation does after bptt_segments segments."""
        return self.map(torch.Tensor.detach)

    def reset(self, mask: Tensor) -> MemoryState:
        """Reset the streams that ``mask`` marks; raises MemtxError unless it is a ``(batch,)`` bool tensor."""
        if mask.dtype != torch.bool or mask.shape != (self.batch_size,):
            expected = f"expected a bool tensor of shape ({self.batch_size},)."
            message = f"reset got {mask.dtype} {tuple(mask.shape)}, {expected}"
            raise MemtxError(message, "Mark the streams to reset with True.")
        return self.map(lambda leaf: leaf.masked_fill(mask.to(leaf.device).view(-1, *[1] * (leaf.dim() - 1)), 0))

    def select(self, indices: Sequence[int] | Tensor) -> MemoryState:
        """Select streams by index, from 0, in the order of ``indices``; an index may occur twice.

        Raises MemtxError if ``indices`` is a mask, or an index is out of range.
        """
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool or index.is_floating_point() or index.dim() != 1:
            message = f"select got {index.dtype} {tuple(index.shape)}, expected a list of indices."
            raise MemtxError(message, "Convert a mask with mask.nonzero().flatten().")
        # On an accelerator the kernel checks the range; reading the indices here would synchronize.
        if index.device.type == "cpu" and index.numel() and not 0 <= index.min() <= index.max() < self.batch_size:
            message = f"select got {index.tolist()} for a batch of {self.batch_size}."
            raise MemtxError(message, f"Use indices from 0 to {self.batch_size - 1}.")
        index = index.to(torch.int64)
        return self.map(lambda leaf: leaf.index_select(0, index.to(leaf.device)))

    @staticmethod
    def concat(states: Sequence[MemoryState]) -> MemoryState:
        """Concatenate states along the batch; raises MemtxError if there are none, or their structures differ."""
        if not states:
            raise MemtxError("concat got no states, expected at least one.")
        flat = [pytree.tree_flatten(state) for state in states]
        signatures = [(spec, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]) for leaves, spec in flat]
        if any(signature != signatures[0] for signature in signatures):
            raise MemtxError("concat got states of different structures.", "Join states of one model only.")
        leaves = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
        return cast(MemoryState, pytree.tree_unflatten(leaves, flat[0][1]))

    def equals(self, other: MemoryState, atol: float = 0.0) -> bool:
        """Return True if both states have the same structure and no value differs by more than ``atol``."""
        tensors, others = self.named_tensors(), other.named_tensors()
        return tensors.keys() == others.keys() and all(
            tensor.shape == others[name].shape
            and tensor.dtype == others[name].dtype
            and torch.allclose(tensor, others[name].to(tensor.device), rtol=0.0, atol=atol)
            for name, tensor in tensors.items()
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Move all tensors to ``device`` and cast floating-point tensors to ``dtype``."""
        return self.map(lambda leaf: leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its key path, such as ``layers[0][0].hidden``."""
        leaves, _ = pytree.tree_flatten_with_path(self)
        return {pytree.keystr(path).lstrip("."): leaf for path, leaf in leaves}

    def with_named_tensors(self, tensors: Mapping[str, Tensor]) -> MemoryState:
        """Return a state of this structure that holds ``tensors``; the batch size may differ.

        Raises CheckpointError if a name is missing or unknown, or a shape or dtype does not fit.
        """
        hint = "Use the model that the state was saved with."
        expected = self.named_tensors()
        if missing := sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(f"The saved state lacks {missing[0]}.", hint)
        if extra := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(f"The saved state has {extra[0]}, which this model does not have.", hint)
        batch_sizes = {tensors[name].shape[:1] for name in expected}
        for name, like in expected.items():
            tensor = tensors[name]
            fits = tensor.shape[1:] == like.shape[1:] and tensor.dtype == like.dtype and tensor.dim() > 0
            if not fits or len(batch_sizes) != 1:
                shape = f"(batch, {', '.join(map(str, like.shape[1:]))})"
                message = f"The saved state's {name} is {tensor.dtype} {tuple(tensor.shape)}"
                raise CheckpointError(f"{message}, expected {like.dtype} {shape}.", hint)
        leaves = [tensors[name].to(like.device) for name, like in expected.items()]
        return cast(MemoryState, pytree.tree_unflatten(leaves, pytree.tree_structure(self)))

    def save(
        self,
        path: str | os.PathLike[str],
        fingerprint: str,
        *,
        dtype: Literal["exact", "int8"] = "exact",
        **metadata: str,
    ) -> None:
        """Write the state to one safetensors file, atomically.

        Args:
            path: File to write.
            fingerprint: Fingerprint of the model, which :meth:`load` checks.
            dtype: "exact" for all bits, "int8" for a smaller file that is close to the state: entries in 8 bits with a
                scale each, matrices in bfloat16.
            **metadata: Further metadata of the header.

        Raises:
            MemtxError: ``dtype`` is unknown, or the file cannot be written.
        """
        if dtype not in ("exact", "int8"):
            raise MemtxError(f"dtype is {dtype!r}.", "Give 'exact' or 'int8'.")
        tensors = self.named_tensors()
        files.save_tensors(
            path,
            compress_tensors(tensors) if dtype == "int8" else tensors,
            kind="memtx.state",
            version=FORMAT_VERSION,
            fingerprint=fingerprint,
            dtype=dtype,
            **metadata,
        )

    @staticmethod
    def load(path: str | os.PathLike[str], *, like: MemoryState, fingerprint: str) -> MemoryState:
        """Read a state that was saved by the model of this fingerprint.

        ``like`` is any state of the model, such as ``model.init_state(1)``, and sets structure and device. Raises
        CheckpointError if the file is damaged, has another format, or belongs to another model.
        """
        tensors, header = files.load_tensors(path, kind="memtx.state", version=FORMAT_VERSION)
        if header.get("fingerprint") != fingerprint:
            fingerprints = f"{header.get('fingerprint', 'none')[:12]}, this model is {fingerprint[:12]}"
            message = f"'{path}' is the state of another model ({fingerprints})."
            raise CheckpointError(message, "Load it with the checkpoint that wrote it.")
        if header.get("dtype") == "int8":
            tensors = decompress_tensors(tensors, {name: leaf.dtype for name, leaf in like.named_tensors().items()})
        return like.with_named_tensors(tensors)
