"""Models that can be saved, and the parts of a run folder or checkpoint that hold one.

A pretrained folder is config.json beside model.safetensors; a training checkpoint holds the same two as entries.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from memtx import class_config, files
from memtx.checkpoint import checksummed_zip, hub, sharded
from memtx.checkpoint.lora import LoRAConfig, merge_lora
from memtx.errors import CheckpointError, MemtxError, corrupt_checkpoint_error

FORMAT = "memtx.model"
FORMAT_VERSION = 2

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

CHECKPOINT_KEY = "memtx"
"""Key of memtx's entry in a training checkpoint, whose "model" is the result of :func:`describe_model`."""

CHECKPOINT_PREFIX = "model."
"""Prefix of the names of the model's weights in a training checkpoint."""

SIDECAR_FILES = {
    "tokenizer": "tokenizer.json",
    "task": "task.json",
    "summary": "summary.json",
    "text_to_text": "text_to_text.json",
    "series": "series.json",
}
"""JSON texts stored with a model, by name, and their files in a pretrained folder."""

TASK_SIDECARS = frozenset({"task", "summary", "text_to_text"})
"""Those of models that answer inputs of a task."""


class PretrainedModel(nn.Module):
    """A model that knows its configuration, so that it can be saved, loaded and identified.

    Attributes:
        config: Class path and constructor arguments, as JSON values.
        adapter_config: LoRA configuration; None without adapters.
        hf_origin: Hugging Face folder that the model was loaded from, for :func:`memtx.hf.save`; None otherwise.
    """

    config: dict[str, Any]
    adapter_config: LoRAConfig | None = None
    hf_origin: object | None = None

    def save_init_args(self, arguments: Mapping[str, Any]) -> None:
        """Record the constructor's arguments, given as its ``locals()``."""
        init_args = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        self.config = {
            "class_path": class_config.to_config(type(self))["class_path"],
            "init_args": class_config.to_config(init_args),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights; a state belongs to the model of equal fingerprint."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.merged_state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return the weights for inference: the state dict with LoRA adapters merged into it."""
        weights = dict(self.state_dict())
        adapters = self.adapter_config
        return weights if adapters is None else merge_lora(weights, adapters.rank, adapters.alpha)

    def save_pretrained(self, path: str | os.PathLike[str], *, hf: bool = False, **options: Any) -> None:
        """Write model.safetensors, then config.json, into a folder.

        Args:
            path: Folder.
            hf: If True, write a language model for ``AutoModelForCausalLM.from_pretrained(path,
                trust_remote_code=True)`` of ``transformers``, with a model card.
            **options: With ``hf``, arguments of :func:`memtx.checkpoint.hf_export.export`, such as ``tokenizer``.

        Raises:
            MemtxError: The folder cannot be written, or ``transformers`` cannot use the model.
        """
        if hf:
            importlib.import_module("memtx.checkpoint.hf_export").export(self, path, **options)
            return
        if options:
            raise MemtxError(f"save_pretrained got {next(iter(options))} without hf=True.", "Add hf=True.")
        weights = drop_tied_aliases(self.merged_state_dict())
        files.save_tensors(Path(path) / WEIGHTS_FILE, weights, kind=FORMAT, version=FORMAT_VERSION)
        files.write_json(Path(path) / CONFIG_FILE, describe_model(self))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload a language model as ``save_pretrained(..., hf=True)`` writes it, and return the commit's URL.

        Options and errors as in :func:`memtx.checkpoint.hf_export.push`, such as ``tokenizer``, ``private`` and
        ``revision``.
        """
        return str(importlib.import_module("memtx.checkpoint.hf_export").push(self, repo_id, **options))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], window: int | None = None, revision: str | None = None
    ) -> Self:
        """Load a model in eval mode on the CPU; raises CheckpointError if it is of another class.

        Arguments and other errors as in :func:`memtx.checkpoint.load.load`.
        """
        # Imported by name, because the loader knows layouts that models must not depend on.
        return cast(Self, importlib.import_module("memtx.checkpoint.load").load(path, window, revision).model_as(cls))


def describe_model(model: PretrainedModel) -> dict[str, Any]:
    """Return the content of config.json, which rebuilds ``model`` without its weights."""
    return {"format": FORMAT, "version": FORMAT_VERSION, **model.config}


def resolve_model_path(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the checkpoint or pretrained folder that ``path`` stands for: for a run folder, its best checkpoint.

    A path ``user/name`` that does not exist stands for a repository of the Hugging Face hub, which is downloaded, of a
    ``revision`` if given. Raises CheckpointError if the path is missing, or a folder without either.
    """
    if hub.is_repo_id(path):
        return hub.download(os.fspath(path), revision)
    path = Path(path)
    if revision is not None:
        raise CheckpointError(f"revision ({revision}) is given, but '{path}' is a local path.", "Remove revision.")
    if not path.exists():
        raise CheckpointError(f"'{path}' does not exist.", "Give a checkpoint, a run folder or a pretrained folder.")
    return find_checkpoint(path) if path.is_dir() and not (path / CONFIG_FILE).is_file() else path


def find_checkpoint(run_dir: Path) -> Path:
    """Return the best checkpoint of a run, named in ``checkpoints/best.json``, or else the newest one.

    A sharded checkpoint, which is a folder, is returned itself. Raises CheckpointError if there is no checkpoint.
    """
    if sharded.is_sharded(run_dir):
        return run_dir
    checkpoints = run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir
    best = checkpoints / "best.json"
    content = files.read_json(best) if best.is_file() else None
    if isinstance(content, dict) and isinstance(name := content.get("path"), str):
        # The run folder may have been moved: its own file of that name comes first.
        for candidate in (checkpoints / Path(name).name, checkpoints / name, run_dir / name):
            if candidate.exists():
                return candidate
    paths = sorted(checkpoints.glob("*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not paths:
        hint = "Give a checkpoint, a run folder (with checkpoints/*.ckpt) or a pretrained folder."
        raise CheckpointError(f"'{run_dir}' holds no checkpoint and no {CONFIG_FILE}.", hint)
    return paths[-1]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a training checkpoint (file or folder of shards), verify every byte and execute nothing in it.

    Raises CheckpointError if it is missing, damaged, or not a checkpoint.
    """
    path = Path(path)
    if sharded.is_sharded(path):
        return sharded.read(path)
    if not path.exists():
        raise CheckpointError(f"'{path}' does not exist.", "Give a checkpoint, a run folder or a pretrained folder.")
    try:
        checksummed_zip.verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the reader can fail in any way on a file that is something else
        raise corrupt_checkpoint_error(path, f" ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a checkpoint.", "Give another file.")
    return content


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint like :func:`read_checkpoint`, but a sharded one without weights and optimizer states."""
    return sharded.read_metadata(path) if sharded.is_sharded(path) else read_checkpoint(path)


def sidecars_from_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that a checkpoint stores with its model, by the names in ``SIDECAR_FILES``."""
    # Lightning names the entry after the data module's class, which may be a user's subclass.
    entries = (entry for entry in checkpoint.values() if isinstance(entry, Mapping))
    keys = ("tokenizer", "series")
    entry = next((entry for entry in entries if any(isinstance(entry.get(key), str) for key in keys)), {})
    return {name: entry[name] for name in SIDECAR_FILES if isinstance(entry.get(name), str)}


def read_sidecars(path: Path) -> dict[str, str]:
    """Return the texts stored in a checkpoint or pretrained folder, by the names in ``SIDECAR_FILES``.

    Raises CheckpointError if the path is a checkpoint, and missing or damaged.
    """
    if not (path / CONFIG_FILE).is_file():
        return sidecars_from_checkpoint(read_metadata(path))
    paths = {name: path / file for name, file in SIDECAR_FILES.items()}
    return {name: path.read_bytes().decode("utf-8", "replace") for name, path in paths.items() if path.is_file()}


def extract_model(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Return a checkpoint's description of its model and the weights, with LoRA adapters merged.

    Raises CheckpointError if memtx did not write the checkpoint.
    """
    if CHECKPOINT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"'{path}' was not written by memtx.", "Give a checkpoint of a memtx run.")
    tensors = checkpoint["state_dict"].items()
    prefix = CHECKPOINT_PREFIX
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}
    content = checkpoint[CHECKPOINT_KEY]
    if (adapters := content.get("lora")) is not None:
        weights = merge_lora(weights, adapters["rank"], adapters["alpha"])
    return content["model"], weights


def drop_tied_aliases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, with tied ones only under the first of their names."""
    names: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in weights.items()
        if names.setdefault(tensor.data_ptr(), name) == name or not tensor.numel()
    }


def describe_mismatches(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return one phrase for each tensor that is missing, unknown or of another shape than expected, by name."""
    return [
        *(f"lacks {name}" for name in expected if name not in actual),
        *(f"has {name}, unknown to the model" for name in actual if name not in expected),
        *(
            f"has {name} of shape {actual[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in actual and actual[name] != shape
        ),
    ]
