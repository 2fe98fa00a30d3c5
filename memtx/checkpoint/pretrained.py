"""Models on disk: config.json beside model.safetensors, or the same two inside a training checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from memtx import class_config, files
from memtx.checkpoint import checksummed_zip, sharded
from memtx.checkpoint.lora import LoRAConfig, merge_lora
from memtx.errors import CheckpointError, corrupt_checkpoint_error

FORMAT_VERSION = 2

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

CHECKPOINT_KEY = "memtx"
"""Where a training checkpoint keeps what :func:`describe_model` returns."""

CHECKPOINT_PREFIX = "model."
"""What the names of the model's weights begin with in a training checkpoint."""


SIDECAR_FILES = {"tokenizer": "tokenizer.json", "task": "task.json", "summary": "summary.json"}
"""What is kept as JSON text beside a model, and the files that hold it in a folder."""


class PretrainedModel(nn.Module):
    """A model that knows how it was made, so that it can be kept on disk and told from others.

    Attributes:
        config: what makes it anew, as numbers, texts, lists and dicts.
        adapter_config: how its weights are adapted; None where they are not.
    """

    config: dict[str, Any]
    adapter_config: LoRAConfig | None = None

    def save_init_args(self, arguments: Mapping[str, Any]) -> None:
        """Take down the constructor's arguments, given as its ``locals()``."""
        given = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        self.config = {
            "class_path": class_config.to_config(type(self))["class_path"],
            "init_args": class_config.to_config(given),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights: states belong to the model of equal fingerprint."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.merged_state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return what is kept for reading: every tensor by its name, with what adapts it merged in."""
        weights = dict(self.state_dict())
        own = self.adapter_config
        return weights if own is None else merge_lora(weights, own.rank, own.alpha)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors of our own format into the folder ``path``."""
        save(self, path)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Build the model kept in a folder of :meth:`save_pretrained`, or in a training checkpoint.

        Raises:
            CheckpointError: missing, damaged, or of another class.
        """
        return cast(Self, load(path, cls))


def describe_model(model: PretrainedModel) -> dict[str, Any]:
    """Return what rebuilds ``model`` without its weights, as numbers, texts, lists and dicts."""
    return {"format": "memtx.model", "version": FORMAT_VERSION, **model.config}


def save(model: PretrainedModel, path: str | os.PathLike[str]) -> None:
    """Write a model into the folder ``path``, weights first, so that a config never stands without them."""
    weights = model.merged_state_dict()
    # Tied weights are kept once, under the first of their names.
    seen: dict[int, str] = {}
    for name, tensor in list(weights.items()):
        if seen.setdefault(tensor.data_ptr(), name) != name and tensor.numel():
            del weights[name]
    files.save_tensors(Path(path) / WEIGHTS_FILE, weights, kind="memtx.model", version=FORMAT_VERSION)
    files.write_json(Path(path) / CONFIG_FILE, describe_model(model))


def load(path: str | os.PathLike[str], expected_class: type[nn.Module] | None = None) -> nn.Module:
    """Build the model kept at ``path``.

    Args:
        path: a folder of :func:`save`, or a training checkpoint, of one process or several.
        expected_class: the class it must be of.

    Raises:
        CheckpointError: missing, damaged, untrusted, or of another class.
    """
    place = Path(path)
    if place.is_dir() and not sharded.is_sharded(place):
        if not (place / CONFIG_FILE).is_file():
            raise CheckpointError(f"'{place}' has no {CONFIG_FILE}.", "Give a folder written by save_pretrained.")
        description = files.read_json(place / CONFIG_FILE)
        weights, _ = files.load_tensors(place / WEIGHTS_FILE, kind="memtx.model", version=FORMAT_VERSION)
    else:
        description, weights = extract_model(read_checkpoint(place), place)
    return _build_model(place, description, weights, expected_class)


def resolve_model_path(path: str | os.PathLike[str]) -> Path:
    """Return the file or the pretrained folder that ``path`` means: of a run's folder, its checkpoint.

    Raises:
        CheckpointError: missing, or a folder that holds neither.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"'{place}' does not exist.", "Give a checkpoint, a run's folder or a pretrained folder.")
    if place.is_dir() and not (place / CONFIG_FILE).is_file():
        return find_checkpoint(place)
    return place


def find_checkpoint(run_dir: Path) -> Path:
    """Return a run's best checkpoint, named in ``checkpoints/best.json``, else its newest; itself, if it is one.

    Raises:
        CheckpointError: the folder holds no checkpoint.
    """
    if sharded.is_sharded(run_dir):
        return run_dir
    checkpoints = run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir
    best = checkpoints / "best.json"
    if best.is_file():
        content = files.read_json(best)
        named = content.get("path") if isinstance(content, dict) else None
        if isinstance(named, str):
            # A run's folder may have been moved: its own file of that name comes first.
            for candidate in (checkpoints / Path(named).name, checkpoints / named, run_dir / named):
                if candidate.exists():
                    return candidate
    found = sorted(checkpoints.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not found:
        raise CheckpointError(
            f"'{run_dir}' holds no checkpoint and no {CONFIG_FILE}.",
            "Give a checkpoint, a run's folder (with checkpoints/*.ckpt) or a pretrained folder.",
        )
    return found[-1]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint, every byte of it checked, without running anything that stands in it.

    Args:
        path: a file, or a folder that several processes wrote; of such a folder the shares are put together.

    Raises:
        CheckpointError: missing, damaged, or no such file or folder.
    """
    place = Path(path)
    if sharded.is_sharded(place):
        return sharded.read(place)
    if not place.exists():
        raise CheckpointError(f"'{place}' does not exist.", "Give a checkpoint, a pretrained folder or a run's folder.")
    try:
        checksummed_zip.verify(place)
        content = torch.load(place, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # A file of somebody else's can make the reader stumble over anything.
        raise corrupt_checkpoint_error(place, f" ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{place}' holds a {type(content).__name__}, not a checkpoint.", "Give another file.")
    return content


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint; of a folder that several processes wrote, all but weights and optimiser.

    Raises:
        CheckpointError: missing, damaged, or no such file or folder.
    """
    return sharded.read_metadata(path) if sharded.is_sharded(path) else read_checkpoint(path)


def sidecars_from_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that a checkpoint keeps beside its model, by the names of ``SIDECAR_FILES``."""
    # Lightning names the part after the data's class, which may be somebody's subclass.
    parts = (part for part in checkpoint.values() if isinstance(part, Mapping))
    part = next((part for part in parts if isinstance(part.get("tokenizer"), str)), {})
    return {name: part[name] for name in SIDECAR_FILES if isinstance(part.get(name), str)}


def read_sidecars(model_path: Path) -> dict[str, str]:
    """Return the texts beside a model, by the names of ``SIDECAR_FILES``.

    Args:
        model_path: as :func:`resolve_model_path` returned it.

    Raises:
        CheckpointError: it is a checkpoint, and missing or damaged.
    """
    if not (model_path / CONFIG_FILE).is_file():
        return sidecars_from_checkpoint(read_metadata(model_path))
    found = {name: model_path / file for name, file in SIDECAR_FILES.items()}
    return {name: path.read_bytes().decode("utf-8", "replace") for name, path in found.items() if path.is_file()}


def extract_model(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint's description of its model, and the model's weights, with what adapts them merged in.

    Raises:
        CheckpointError: it is not a checkpoint of memtx.
    """
    if CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"'{path}' is a checkpoint of something else.", "Give one that memtx wrote.")
    weights = {
        name.removeprefix(CHECKPOINT_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(CHECKPOINT_PREFIX)
    }
    kept = checkpoint[CHECKPOINT_KEY]
    if (adapters := kept.get("lora")) is not None:
        weights = merge_lora(weights, adapters["rank"], adapters["alpha"])
    return kept["model"], weights


def _build_model(
    path: Path, description: Any, weights: dict[str, Tensor], expected_class: type[nn.Module] | None
) -> nn.Module:
    if not isinstance(description, dict) or description.get("format") != "memtx.model":
        raise CheckpointError(f"'{path}' does not describe a memtx model.", "Give one that memtx wrote.")
    if description.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path}' has format version {description.get('version')}, this release reads {FORMAT_VERSION}.",
            "Use the release that wrote it.",
        )
    made = class_config.from_config({key: description[key] for key in ("class_path", "init_args")})()
    if not isinstance(made, nn.Module) or (expected_class is not None and not isinstance(made, expected_class)):
        raise CheckpointError(
            f"'{path}' holds a {type(made).__name__}, "
            f"expected {expected_class.__name__ if expected_class else 'a model'}.",
            "memtx.from_pretrained picks the class by itself.",
        )
    own = made.state_dict()
    aliases = {name: [other for other in own if own[other].data_ptr() == own[name].data_ptr()] for name in own}
    weights = {**{alias: tensor for name, tensor in weights.items() for alias in aliases.get(name, ())}, **weights}
    wrong = [f"lacks {name}" for name in own if name not in weights]
    wrong += [f"has {name}, unknown to the model" for name in weights if name not in own]
    wrong += [
        f"has {name} of shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"'{path}' {'; '.join(wrong[:5])}.", "It was changed after it was written; take a copy.")
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        made.to(dtypes.pop())
    made.load_state_dict(weights)
    return made.eval()
