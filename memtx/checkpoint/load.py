"""One loader for every form of a model: run folder, training checkpoint, pretrained folder, Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from memtx import class_config, files, hf
from memtx.checkpoint import pretrained
from memtx.checkpoint.pretrained import PretrainedModel
from memtx.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_reformer import RecurrentReformer
from memtx.models.reformer import Reformer

ModelT = TypeVar("ModelT", bound=PretrainedModel)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model and the content stored with it.

    Attributes:
        path: Checkpoint or folder that was read.
        model: Model in eval mode, on the CPU.
        sidecars: JSON texts such as the tokenizer, by the names in ``SIDECAR_FILES``.
        metadata: Content of a training checkpoint without weights and optimizer states; empty for a folder.
    """

    path: Path
    model: PretrainedModel
    sidecars: Mapping[str, str]
    metadata: Mapping[str, Any]

    def model_as(self, model_class: type[ModelT]) -> ModelT:
        """Return the model; raises CheckpointError if it is not of ``model_class``."""
        if not isinstance(self.model, model_class):
            message = f"'{self.path}' holds a {type(self.model).__name__}, expected {model_class.__name__}."
            raise CheckpointError(message, "memtx.from_pretrained chooses the class itself.")
        return self.model


def load(path: str | os.PathLike[str], window: int | None = None, revision: str | None = None) -> LoadedCheckpoint:
    """Load a model in eval mode, on the CPU, in the dtype of its stored weights.

    Args:
        path: Run folder (loads its best checkpoint, else the newest); training checkpoint (a file, or a folder if
            sharded); pretrained folder; Hugging Face folder (config.json with a ``model_type``); or ``user/name`` of
            the Hugging Face hub for any folder there, unless there is such a path.
        window: Exact positions seen by a Hugging Face decoder. Defaults to its trained length. Layers trained with
            a narrower window keep it.
        revision: Branch, tag or commit on the hub. Defaults to the main branch.

    Raises:
        CheckpointError: The model is missing, damaged, untrusted, or its tensors do not fit the configuration; or the
            hub cannot be reached.
        MemtxError: ``window`` is given for a model that is not a Hugging Face decoder.
    """
    path = pretrained.resolve_model_path(path, revision)
    is_folder = (path / pretrained.CONFIG_FILE).is_file()
    if is_folder and hf.is_hf_folder(path):
        return LoadedCheckpoint(path, hf.load(path, window), pretrained.read_sidecars(path), {})
    if window is not None:
        message = f"window ({window}) is given, but '{path}' is not a Hugging Face decoder."
        raise MemtxError(message, "Remove window; with_memory sets the window of a MemoryTransformer.")
    if is_folder:
        config = files.read_json(path / pretrained.CONFIG_FILE)
        format_and_version: dict[str, Any] = {"kind": pretrained.FORMAT, "version": pretrained.FORMAT_VERSION}
        weights, _ = files.load_tensors(path / pretrained.WEIGHTS_FILE, **format_and_version)
        return LoadedCheckpoint(path, _build_model(path, config, weights), pretrained.read_sidecars(path), {})
    checkpoint = pretrained.read_checkpoint(path)
    checkpoint.pop("optimizer_states", None)
    model = _build_model(path, *pretrained.extract_model(checkpoint, path))
    del checkpoint["state_dict"]
    return LoadedCheckpoint(path, model, pretrained.sidecars_from_checkpoint(checkpoint), checkpoint)


def from_pretrained(
    path: str | os.PathLike[str], window: int | None = None, revision: str | None = None
) -> PretrainedModel:
    """Load a model of any class; arguments and errors as in :func:`load`."""
    return load(path, window, revision).model


def load_model_and_tokenizer(
    path: str | os.PathLike[str], window: int | None = None
) -> tuple[MemoryTransformer, Tokenizer]:
    """Load a memory transformer, in eval mode on the CPU, and its tokenizer; arguments as in :func:`load`.

    A folder needs a tokenizer.json, or vocab.json and merges.txt. Raises CheckpointError if the model is missing,
    damaged or of another class, or has no tokenizer that fits it.
    """
    checkpoint = load(path, window)
    model = checkpoint.model_as(MemoryTransformer)
    return model, _load_tokenizer(checkpoint, model.vocab_size)


def load_language_model(
    path: str | os.PathLike[str], window: int | None = None
) -> tuple[MemoryTransformer | RecurrentReformer, Tokenizer]:
    """Load any recurrent language model, as :func:`load_model_and_tokenizer` does; a Reformer reads by whole calls."""
    checkpoint = load(path, window)
    if not isinstance(checkpoint.model, MemoryTransformer | Reformer):
        message = f"'{checkpoint.path}' holds a model that continues no text ({type(checkpoint.model).__name__})."
        raise CheckpointError(message, "Give a language model; memtx predict runs models of tasks.")
    if not isinstance(checkpoint.model, Reformer):
        model = checkpoint.model_as(MemoryTransformer)
        return model, _load_tokenizer(checkpoint, model.vocab_size)
    reformer = RecurrentReformer(checkpoint.model).eval()
    return reformer, _load_tokenizer(checkpoint, reformer.vocab_size)


def _load_tokenizer(checkpoint: LoadedCheckpoint, model_vocab_size: int) -> Tokenizer:
    path = checkpoint.path
    is_folder = (path / pretrained.CONFIG_FILE).is_file()
    text = checkpoint.sidecars.get("tokenizer")
    if text is None and not is_folder:
        message = f"'{path}' has no tokenizer in it."
        raise CheckpointError(message, "Give a checkpoint of a run on texts, or a pretrained folder.")
    try:
        tokenizer = load_tokenizer(path) if is_folder or text is None else tokenizer_from_json(text)
    except DataError as error:
        if text is not None:
            raise
        raise CheckpointError(error.message, error.hint) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' has a damaged tokenizer: {error}.", "Restore it from a copy.") from error
    if tokenizer.vocab_size > model_vocab_size:
        message = f"The tokenizer in '{path}' has {tokenizer.vocab_size} tokens, its model {model_vocab_size}."
        raise CheckpointError(message, "Use the tokenizer that the model was trained with.")
    return tokenizer


def _build_model(path: Path, description: Any, weights: dict[str, Tensor]) -> PretrainedModel:
    if not isinstance(description, dict) or description.get("format") != pretrained.FORMAT:
        raise CheckpointError(f"'{path}' does not describe a memtx model.", "Give one that memtx wrote.")
    if (version := description.get("version")) != pretrained.FORMAT_VERSION:
        message = f"'{path}' has format version {version}, this release reads {pretrained.FORMAT_VERSION}."
        raise CheckpointError(message, "Use the release that wrote it.")
    model = class_config.from_config({key: description[key] for key in ("class_path", "init_args")})()
    if not isinstance(model, PretrainedModel):
        raise CheckpointError(f"'{path}' describes a {type(model).__name__}, not a model.", "Give another folder.")
    state = model.state_dict()
    # Tied weights are stored under one of their names.
    aliases = {name: [alias for alias in state if state[alias].data_ptr() == state[name].data_ptr()] for name in state}
    weights = {**{alias: tensor for name, tensor in weights.items() for alias in aliases.get(name, ())}, **weights}
    shapes, stored_shapes = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (state, weights)
    )
    if mismatches := pretrained.describe_mismatches(shapes, stored_shapes):
        message = f"'{path}' {'; '.join(mismatches[:5])}."
        raise CheckpointError(message, "It was changed after writing; use another copy.")
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(weights)
    return model.eval()
