"""A Hugging Face folder: config.json, and tensors that stay on disk until they are read to their destination.

Tensors are in model.safetensors, in several such files with an index, or in pytorch_model.bin, a pickle that is read
for its tensors only. The touched pages of a memory-mapped file count as memory of the process, so copying from one
would hold the weights twice; safetensors are therefore read directly to their destination.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtx import files
from memtx.errors import CheckpointError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
OTHER_SUFFIXES = (".gguf", ".ggml", ".pth", ".pt", ".bin", ".safetensors", ".msgpack", ".h5", ".onnx")
"""Ends of the names of weights, also in other formats and under other names."""
INDEX_SUFFIX = ".index.json"

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
"""Supported dtypes by their names in safetensors files."""

CHUNK_BYTES = 1 << 20
"""Bytes read at a time if they cannot be read directly to their destination."""


@dataclass(frozen=True)
class LazyTensor(ABC):
    """A tensor of a checkpoint, with its dtype and shape on disk, that can be read in parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Fill ``target``, contiguous and of any dtype, with the rows from ``start``."""


@dataclass(frozen=True)
class SafetensorsTensor(LazyTensor):
    """A tensor in a safetensors file, ``byte_offset`` bytes from its beginning."""

    path: Path
    byte_offset: int

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Read the rows directly into ``target``, or in chunks if it has another dtype."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.path, "rb") as handle:
            handle.seek(self.byte_offset + start * row_bytes)
            if target.dtype == self.dtype:
                self._read_exact(handle, target)
                return
            num_rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
            buffer = torch.empty((num_rows, *self.shape[1:]), dtype=self.dtype)
            for part in torch.split(target, num_rows) if target.dim() else (target,):
                chunk = buffer[: part.shape[0]] if part.dim() else buffer[0]
                self._read_exact(handle, chunk)
                part.copy_(chunk)

    def _read_exact(self, handle: Any, target: Tensor) -> None:
        array = target.detach().reshape(-1).view(torch.uint8).numpy()
        if array.nbytes and handle.readinto(array) != array.nbytes:
            raise CheckpointError(f"'{self.path}' ends too early.", "Download it again.")


@dataclass(frozen=True)
class LoadedTensor(LazyTensor):
    """A tensor in memory, or memory-mapped."""

    tensor: Tensor

    def read_into(self, target: Tensor, start: int = 0) -> None:
        """Copy the rows from ``start`` into ``target``."""
        target.copy_(self.tensor[start : start + target.shape[0]] if target.dim() else self.tensor)


def materialize(tensor: LazyTensor) -> Tensor:
    """Return the whole tensor."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read_into(out)
    return out


def tensors_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors have the same dtype and values, compared in chunks."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(torch.equal(chunk, other) for chunk, other in zip(iter_chunks(a), iter_chunks(b), strict=True))


def iter_chunks(tensor: LazyTensor) -> Iterator[Tensor]:
    """Yield consecutive rows of a tensor, always in the same buffer."""
    num_rows = min(max(1, CHUNK_BYTES // max(1, prod(tensor.shape[1:]) * tensor.dtype.itemsize)), tensor.shape[0])
    buffer = torch.empty((num_rows, *tensor.shape[1:]), dtype=tensor.dtype)
    for start in range(0, tensor.shape[0], max(num_rows, 1)):
        chunk = buffer[: tensor.shape[0] - start]
        tensor.read_into(chunk, start)
        yield chunk


@dataclass(frozen=True)
class HFCheckpoint:
    """Content of a folder: config.json, as text and parsed, and its tensors by name, still on disk."""

    path: Path
    config_text: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def read_config(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Return a folder's config.json as text and parsed; raises CheckpointError if it is missing or damaged."""
    config_path = Path(path) / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(f"'{path}' has no {CONFIG_FILE}.", "Give a folder with a complete checkpoint.")
    config = files.read_json(config_path)
    if not isinstance(config, dict):
        raise CheckpointError(f"'{config_path}' holds a {type(config).__name__}, not a JSON object.", "Restore it.")
    return config_path.read_bytes().decode("utf-8"), config


def open_checkpoint(path: str | os.PathLike[str]) -> HFCheckpoint:
    """Open a folder without reading its tensors; those of a pickle are memory-mapped.

    Raises CheckpointError if a file is missing, is damaged, or holds more than tensors.
    """
    config_text, config = read_config(path)
    return HFCheckpoint(Path(path), config_text, config, _open_tensors(Path(path)))


def _open_tensors(folder: Path) -> dict[str, LazyTensor]:
    for name, open_file in ((SAFETENSORS_FILE, _open_safetensors), (PICKLE_FILE, _open_pickle)):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / (name + INDEX_SUFFIX)).is_file():
            tensors: dict[str, LazyTensor] = {}
            for file_name, names in _read_index(folder / (name + INDEX_SUFFIX)).items():
                path = folder / file_name
                if not path.is_file():
                    raise CheckpointError(f"'{folder}' lacks {file_name}, named in its index.", "Download the file.")
                shard = open_file(path)
                if missing := sorted(names - shard.keys()):
                    message = f"'{path}' lacks {', '.join(missing)}, which the index lists there."
                    raise CheckpointError(message, "The index belongs to other files; download all of them again.")
                tensors.update(shard)
            return tensors
    message = f"'{folder}' has neither {SAFETENSORS_FILE} nor {PICKLE_FILE}, nor an index of either."
    hint = "Give a folder with a complete checkpoint."
    if others := sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_SUFFIXES):
        hint = f"{', '.join(others[:3])} cannot be read. {hint}"
    if (folder / "adapter_config.json").is_file():
        hint = "It holds an adapter: merge it into its base model first (peft's merge_and_unload)."
    raise CheckpointError(message, hint)


def _read_index(index_path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors in each file of an index."""
    content = files.read_json(index_path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index_path}' has no weight_map.", "Download it again.")
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # A downloaded index must not cause reads outside its folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            message = f"'{index_path}' puts {name} into {file_name!r}, which is not a file in its folder."
            raise CheckpointError(message, "Download it again.")
        shards.setdefault(file_name, set()).add(name)
    return shards


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file, reading only its header."""
    from safetensors import SafetensorError, safe_open

    try:
        # Checks that the file is complete and its tensors do not overlap.
        with safe_open(str(path), framework="pt"):
            pass
        with open(path, "rb") as handle:
            (header_length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(header_length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a valid safetensors file: {error}.", "Download it again.") from error
    tensors: dict[str, LazyTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            message = f"'{path}' holds {name} as {entry['dtype']}, expected one of {', '.join(DTYPES)}."
            raise CheckpointError(message, "Convert the checkpoint to bfloat16.")
        offset = 8 + header_length + entry["data_offsets"][0]
        tensors[name] = SafetensorsTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), path, offset)
    return tensors


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        # Files from before torch 1.6 are not zip files and cannot be memory-mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        message = f"'{path}' holds more than tensors, and a pickle can execute arbitrary code."
        raise CheckpointError(message, f"Convert it to {SAFETENSORS_FILE} if you trust it.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        message = f"'{path}' is not a valid checkpoint ({type(error).__name__})."
        raise CheckpointError(message, "Download it again.") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"'{path}' does not hold tensors by name.", "Give the weights of a model.")
    return {str(name): LoadedTensor(tensor.dtype, tuple(tensor.shape), tensor) for name, tensor in content.items()}


def write_checkpoint(path: str | os.PathLike[str], config_text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, then config.json; raises MemtxError if the folder cannot be written."""
    # transformers requires the format "pt" in the header, which save_tensors writes.
    files.save_tensors(Path(path) / SAFETENSORS_FILE, tensors, kind="transformers", version=1)
    files.write_text(Path(path) / CONFIG_FILE, config_text)
