"""A folder in the layout of the ``transformers`` library as it lies on disk: config.json and tensors by name.

The tensors are in model.safetensors, in several such files with an index, or in pytorch_model.bin, which is a pickle
and is therefore read for its tensors alone.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memtx import files
from memtx.errors import CheckpointError
from memtx.hf.lazy_tensors import LazyTensor, LoadedTensor, open_safetensors

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        path: the folder.
        config_text: config.json, word for word.
        config: the same, read.
        tensors: every tensor by its name in the layout, on the CPU.
    """

    path: Path
    config_text: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_config(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Return a folder's config.json, word for word and read.

    Raises:
        CheckpointError: missing, damaged, or not a JSON object.
    """
    place = Path(path) / CONFIG_FILE
    if not place.is_file():
        raise CheckpointError(f"'{path}' has no {CONFIG_FILE}.", "Give the folder that holds the whole checkpoint.")
    config = files.read_json(place)
    if not isinstance(config, dict):
        raise CheckpointError(f"'{place}' holds a {type(config).__name__}, not a JSON object.", "Restore it.")
    return place.read_bytes().decode("utf-8"), config


@dataclass(frozen=True)
class LazyCheckpoint:
    """What a folder holds, its tensors still on disk.

    Attributes:
        path: the folder.
        config_text: config.json, word for word.
        config: the same, read.
        tensors: every tensor by its name in the layout.
    """

    path: Path
    config_text: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a folder.

    Raises:
        CheckpointError: a file is missing, damaged, or holds more than tensors.
    """
    place = Path(path)
    text, config = read_config(place)
    return Checkpoint(place, text, config, _read_tensors(place, _load_safetensors, _load_pickle))


def open_lazy(path: str | os.PathLike[str]) -> LazyCheckpoint:
    """Look into a folder without reading its tensors; those of a pickle are mapped.

    Raises:
        CheckpointError: as :func:`read`.
    """
    place = Path(path)
    text, config = read_config(place)

    def mapped(path: Path) -> Mapping[str, LazyTensor]:
        return {name: LoadedTensor(tensor) for name, tensor in _load_pickle(path, mmap=True).items()}

    return LazyCheckpoint(place, text, config, _read_tensors(place, open_safetensors, mapped))


T = TypeVar("T")
Reader = Callable[[Path], Mapping[str, T]]


def _read_tensors(folder: Path, read_safetensors: Reader[T], read_pickle: Reader[T]) -> dict[str, T]:
    """Return what the readers find in the folder's files."""
    for name, reader in ((SAFETENSORS_FILE, read_safetensors), (PICKLE_FILE, read_pickle)):
        if (folder / name).is_file():
            return dict(reader(folder / name))
        if (folder / (name + INDEX_SUFFIX)).is_file():
            tensors: dict[str, T] = {}
            for part, named in _shard_index(folder / (name + INDEX_SUFFIX)).items():
                if not (folder / part).is_file():
                    raise CheckpointError(f"'{folder}' lacks {part}, which its index names.", "Fetch the missing file.")
                found = reader(folder / part)
                if missing := sorted(named - found.keys()):
                    raise CheckpointError(
                        f"'{folder / part}' lacks {', '.join(missing)}, which the index puts there.",
                        "Index and files do not belong together; fetch both again.",
                    )
                tensors.update(found)
            return tensors
    raise CheckpointError(
        f"'{folder}' has neither {SAFETENSORS_FILE} nor {PICKLE_FILE}, nor an index of either.",
        "Give the folder that holds the whole checkpoint.",
    )


def _shard_index(index_path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors in each file of an index."""
    content = files.read_json(index_path)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"'{index_path}' has no weight_map.", "Fetch it again.")
    parts: dict[str, set[str]] = {}
    for name, part in places.items():
        # A file of the folder itself: an index from elsewhere is not to make us read other places.
        if not isinstance(part, str) or Path(part).name != part:
            raise CheckpointError(
                f"'{index_path}' puts {name} into {part!r}, which is no file beside it.", "Fetch it again."
            )
        parts.setdefault(part, set()).add(name)
    return parts


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            # Copied to memory of torch's own alignment, as in files.load_tensors.
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {error}.", "Fetch it again.") from error


def _load_pickle(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors, and a pickle can run anything.",
            f"Convert it to {SAFETENSORS_FILE} where you trust it.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"'{path}' is not a whole file ({type(error).__name__}).", "Fetch it again.") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"'{path}' is no table of tensors by name.", "Give the weights of a model.")
    return {str(name): tensor if mmap else tensor.clone() for name, tensor in content.items()}


def write(path: str | os.PathLike[str], config_text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, weights first, so that a config never stands without them.

    Raises:
        MemtxError: the folder cannot be written to.
    """
    place = Path(path)
    # As the library marks its own files: it refuses one whose header does not say "pt".
    files.save_tensors(place / SAFETENSORS_FILE, tensors, kind="transformers", version=1)
    files.write_text(place / CONFIG_FILE, config_text)
