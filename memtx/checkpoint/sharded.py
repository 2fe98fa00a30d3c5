"""Checkpoints that are folders: every process's share of the weights in a file of its own.

The shares are torch.distributed.checkpoint's. Beside them stand ``.metadata`` (its own: which part of which tensor is
where), ``meta.pt`` (Lightning's: all that is no weight) and ``files.json`` (ours: the checksum of each). torch's reader
unpickles what it finds; this one makes nothing but the few classes that a checkpoint consists of.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from memtx import files
from memtx.errors import CheckpointError, MemtxError, corrupt_checkpoint_error

DCP_METADATA_FILE = ".metadata"
META_FILE = "meta.pt"
CHECKSUMS_FILE = "files.json"

_SAFE_GLOBALS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""What a ``.metadata`` may be made of, by module."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _SAFE_GLOBALS.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder with shares of a checkpoint in it, whole or not."""
    return any((Path(path) / name).is_file() for name in (DCP_METADATA_FILE, META_FILE, CHECKSUMS_FILE))


def write_checksums(path: Path, checksums: Mapping[str, str]) -> None:
    """Write what the folder's files must be: last, so that a folder without it is not whole.

    Args:
        path: the folder.
        checksums: by file name, of :func:`memtx.files.checksum`.
    """
    files.write_json(path / CHECKSUMS_FILE, dict(checksums))


def verify_checksums(path: str | os.PathLike[str]) -> None:
    """Compare every file of the folder with its checksum.

    Raises:
        CheckpointError: one is missing or not what was written.
    """
    place = Path(path)
    try:
        known = files.read_json(place / CHECKSUMS_FILE)
        if not isinstance(known, dict) or not {DCP_METADATA_FILE, META_FILE} <= known.keys():
            raise MemtxError(f"'{place / CHECKSUMS_FILE}' does not name the checkpoint's files.")
        # Names alone: a file elsewhere is none of the checkpoint's.
        wrong = [name for name in known if Path(name).name != name or files.checksum(place / name) != known[name]]
    except MemtxError as error:
        raise corrupt_checkpoint_error(place, f": {error.message.rstrip('.')}") from error
    except OSError as error:
        raise corrupt_checkpoint_error(
            place, f": '{Path(str(error.filename)).name}' could not be read: {error.strerror}"
        ) from error
    if wrong:
        raise corrupt_checkpoint_error(place, f": '{wrong[0]}' in it is not what was written")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return all that is no weight and no optimiser's state.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = torch.load(Path(path) / META_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of somebody else's can make the reader stumble over anything
        raise _corrupt_error(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a checkpoint.", "Give another folder.")
    return content


def load_into(path: str | os.PathLike[str], state: dict[str, Any], *, no_dist: bool = False) -> None:
    """Fill the tensors and values of ``state``, whole or shared out, from the folder's shares.

    Args:
        path: the folder.
        state: names and nesting as they were saved; its tensors are written to in place.
        no_dist: whether this process reads by itself; otherwise all do together.

    Raises:
        CheckpointError: something is missing, damaged or of another shape.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import ReadItem
    from torch.distributed.checkpoint.state_dict_loader import load

    class Planner(DefaultLoadPlanner):
        """Reads values as torch.load does of files that nobody trusts."""

        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            plain = io.BytesIO()
            torch.save(torch.load(value, weights_only=True), plain)
            plain.seek(0)
            super().load_bytes(read_item, plain)

    try:
        load(state, storage_reader=_storage_reader(path), planner=Planner(), no_dist=no_dist)
    except Exception as error:  # torch raises one of its own, around whatever went wrong on whichever process
        raise _corrupt_error(path, error) from error


def _storage_reader(path: str | os.PathLike[str]) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        """Reads ``.metadata`` without running anything that stands in it."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open(Path(path) / DCP_METADATA_FILE, "rb") as handle:
                metadata = cast(Metadata, _RestrictedUnpickler(handle).load())
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    return Reader(path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the whole checkpoint as one process would have written it, whatever number of processes did.

    Raises:
        CheckpointError: missing, damaged, or not such a folder.
    """
    verify_checksums(path)
    content = read_metadata(path)
    try:
        metadata = _storage_reader(path).read_metadata()
        flat = {name: _empty_tensor(kept) for name, kept in metadata.state_dict_metadata.items()}
        places = metadata.planner_data
    except Exception as error:  # what is no checkpoint's metadata fails in as many ways as there are files
        raise _corrupt_error(path, error) from error
    load_into(path, flat, no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        inner = nested
        *above, last = places[name]
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    content["state_dict"] = nested.pop("state_dict", {})
    content["optimizer_states"] = [_optimizer_state_by_index(nested[name]) for name in sorted(nested)]
    return content


def _empty_tensor(metadata: Any) -> Tensor | None:
    size = getattr(metadata, "size", None)
    return None if size is None else torch.empty(size, dtype=metadata.properties.dtype)


def _optimizer_state_by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state with its parameters numbered, as one process keeps it, instead of named."""
    groups = state["param_groups"]
    groups = [groups[place] for place in sorted(groups)] if isinstance(groups, dict) else groups
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def optimizer_state_by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an optimiser's state with its parameters named, as shares keep it, instead of numbered.

    Args:
        state: as one process keeps it.
        names: by number.

    Raises:
        CheckpointError: it has other parameters.
    """
    count = sum(len(group["params"]) for group in state["param_groups"])
    if count != len(names):
        raise CheckpointError(
            f"The checkpoint's optimiser has {count} parameters, this run's {len(names)}.",
            "Use the config saved beside the checkpoint.",
        )
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def _corrupt_error(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    said = " ".join(str(error).split())[-200:]
    return corrupt_checkpoint_error(path, f" ({type(error).__name__}: {said})")
