"""Sharded checkpoints: folders with a file for each process's part of the weights.

The shards are torch.distributed.checkpoint's. Beside them are ``.metadata`` (its own: the location of each part of each
tensor), ``meta.pt`` (Lightning's: everything but weights and optimizer states) and ``files.json`` (ours: checksums of
all files). torch's reader unpickles anything; ours creates only the few classes that a checkpoint consists of.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from memtx import files
from memtx.errors import CheckpointError, MemtxError, corrupt_checkpoint_error

DCP_METADATA_FILE = ".metadata"
META_FILE = "meta.pt"
CHECKSUMS_FILE = "files.json"

_DCP = "torch.distributed.checkpoint"
_SAFE_GLOBALS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Names that a ``.metadata`` file may contain, by module."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        if is_dtype or name in _SAFE_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is the folder of a sharded checkpoint, complete or not."""
    return any((Path(path) / name).is_file() for name in (DCP_METADATA_FILE, META_FILE, CHECKSUMS_FILE))


def write_checksums(path: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums (:func:`memtx.files.checksum`) of a folder's files, by name, after all other files."""
    files.write_json(path / CHECKSUMS_FILE, dict(checksums))


def verify_checksums(path: str | os.PathLike[str]) -> None:
    """Compare every file of a folder with its checksum; raises CheckpointError if a file is missing or changed."""
    folder = Path(path)
    try:
        checksums = files.read_json(folder / CHECKSUMS_FILE)
        if not isinstance(checksums, dict) or not {DCP_METADATA_FILE, META_FILE} <= checksums.keys():
            raise MemtxError(f"'{folder / CHECKSUMS_FILE}' does not name the checkpoint's files.")
        for name, expected in checksums.items():
            # A name must not lead out of the folder.
            if Path(name).name != name or files.checksum(folder / name) != expected:
                raise corrupt_checkpoint_error(folder, f": '{name}' in it is not what was written")
    except CheckpointError:
        raise
    except MemtxError as error:
        raise corrupt_checkpoint_error(folder, f": {error.message.rstrip('.')}") from error
    except OSError as error:
        reason = f": '{Path(str(error.filename)).name}' could not be read: {error.strerror}"
        raise corrupt_checkpoint_error(folder, reason) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return everything but the weights and optimizer states; raises CheckpointError if the folder cannot be read."""
    try:
        content = torch.load(Path(path) / META_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader can fail in any way on a file that is something else
        raise _corrupt_error(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a checkpoint.", "Give another folder.")
    return content


def load_into(path: str | os.PathLike[str], state: dict[str, Any], *, no_dist: bool = False) -> None:
    """Fill the tensors (in place) and values of ``state``, which has the saved names and nesting, whole or sharded.

    If ``no_dist`` is True, this process reads alone; otherwise all processes read together. Raises CheckpointError if
    anything is missing, damaged or of another shape.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import ReadItem
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        """Loads values with ``weights_only``, which torch's planner does not."""

        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            checked = io.BytesIO()
            torch.save(torch.load(value, weights_only=True), checked)
            checked.seek(0)
            super().load_bytes(read_item, checked)

    try:
        load(state, storage_reader=_create_storage_reader(path), planner=Planner(), no_dist=no_dist)
    except Exception as error:  # torch wraps the error of the process that failed
        raise _corrupt_error(path, error) from error


def _create_storage_reader(path: str | os.PathLike[str]) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        """Reads ``.metadata`` without executing anything in it."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open(Path(path) / DCP_METADATA_FILE, "rb") as handle:
                metadata = cast(Metadata, _RestrictedUnpickler(handle).load())
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return Reader(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the whole checkpoint as a single process would have written it; raises like :func:`verify_checksums`."""
    verify_checksums(path)
    content = read_metadata(path)
    try:
        metadata = _create_storage_reader(path).read_metadata()
        flat = {name: _empty_tensor(entry) for name, entry in metadata.state_dict_metadata.items()}
        key_paths = metadata.planner_data
    except Exception as error:  # the reader can fail in any way on a file that is something else
        raise _corrupt_error(path, error) from error
    load_into(path, flat, no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = key_paths[name]
        reduce(lambda level, key: level.setdefault(key, {}), outer, nested)[last] = value
    content["state_dict"] = nested.pop("state_dict", {})
    content["optimizer_states"] = [_optimizer_state_by_index(nested[name]) for name in sorted(nested)]
    return content


def _empty_tensor(metadata: Any) -> Tensor | None:
    size = getattr(metadata, "size", None)
    return None if size is None else torch.empty(size, dtype=metadata.properties.dtype)


def _optimizer_state_by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with parameters numbered, as a single process stores it, instead of named."""
    groups = state["param_groups"]
    groups = [groups[index] for index in sorted(groups)] if isinstance(groups, dict) else groups
    indices = {name: index for index, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {indices[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [indices[name] for name in group["params"]]} for group in groups],
    }


def optimizer_state_by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters named, as shards store it, instead of numbered.

    Raises CheckpointError if the number of ``names`` differs from the state's.
    """
    groups = state["param_groups"]
    if (count := sum(len(group["params"]) for group in groups)) != len(names):
        message = f"The checkpoint's optimizer has {count} parameters, this run's {len(names)}."
        raise CheckpointError(message, "Use the config saved beside the checkpoint.")
    return {
        "state": {names[index]: values for index, values in state["state"].items()},
        "param_groups": [{**group, "params": [names[index] for index in group["params"]]} for group in groups],
    }


def _corrupt_error(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return corrupt_checkpoint_error(path, f" ({type(error).__name__}: {' '.join(str(error).split())[-200:]})")
