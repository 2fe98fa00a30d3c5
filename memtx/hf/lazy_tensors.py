"""Tensors that stay on disk until they are read into memory that is theirs for good: a checkpoint in one pass.

A file that is mapped into memory counts as the process's own once it was touched, and would be held twice while its
tensors are copied; here a tensor's bytes are read to where they are to stand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memtx.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

CHUNK_BYTES = 1 << 20
"""Bytes read at a time where they are not read to their own place."""


class LazyTensor(Protocol):
    """A tensor of a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is kept."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is kept."""

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Write the rows from ``start`` on into ``target``, contiguous, of any type, as many as it has."""


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor in a safetensors file.

    Attributes:
        path: of the file.
        byte_offset: the byte in the file at which it begins.
        dtype: as it is kept.
        shape: likewise.
    """

    path: Path
    byte_offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Read to where the bytes are to stand; by chunks where the type is another."""
        width = prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.path, "rb") as handle:
            handle.seek(self.byte_offset + start * width)
            if target.dtype == self.dtype:
                self._read_exact(handle, target)
                return
            rows = max(1, CHUNK_BYTES // max(width, 1))
            room = torch.empty((rows, *self.shape[1:]), dtype=self.dtype)
            for part in torch.split(target, rows) if target.dim() else (target,):
                own = room[: part.shape[0]] if part.dim() else room[0]
                self._read_exact(handle, own)
                part.copy_(own)

    def _read_exact(self, handle: Any, target: Tensor) -> None:
        place = target.detach().reshape(-1).view(torch.uint8).numpy()
        if place.nbytes and handle.readinto(place) != place.nbytes:
            raise CheckpointError(f"'{self.path}' ends too early.", "Fetch it again.")


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor that was read already, or mapped."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """As it is kept."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is kept."""
        return tuple(self.tensor.shape)

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Copy."""
        target.copy_(self.tensor[start : start + target.shape[0]] if target.dim() else self.tensor)


def materialize(tensor: LazyTensor) -> Tensor:
    """Return all of a tensor."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read_into(out)
    return out


def tensors_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors hold the same numbers in the same type, by chunks."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(torch.equal(mine, theirs) for mine, theirs in zip(iter_chunks(a), iter_chunks(b), strict=True))


def iter_chunks(tensor: LazyTensor) -> Iterator[Tensor]:
    """Yield a tensor's rows, some at a time, each time in the same memory."""
    rows = min(max(1, CHUNK_BYTES // max(1, prod(tensor.shape[1:]) * tensor.dtype.itemsize)), tensor.shape[0])
    room = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
    for first in range(0, tensor.shape[0], max(rows, 1)):
        part = room[: tensor.shape[0] - first]
        tensor.read_into(part, first)
        yield part


def open_safetensors(path: Path) -> Mapping[str, SafetensorsTensor]:
    """Return the tensors of a safetensors file by name, read no further than its header.

    Raises:
        CheckpointError: the file is not whole, or holds a type that is not read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Its own check that the file is whole and its parts do not overlap.
        with safe_open(str(path), framework="pt"):
            pass
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {error}.", "Fetch it again.") from error
    found = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        if facts["dtype"] not in DTYPES:
            raise CheckpointError(
                f"'{path}' holds {name} as {facts['dtype']}, read are {', '.join(DTYPES)}.",
                "Convert the checkpoint to bfloat16.",
            )
        begin = 8 + length + facts["data_offsets"][0]
        found[name] = SafetensorsTensor(path, begin, DTYPES[facts["dtype"]], tuple(facts["shape"]))
    return found
