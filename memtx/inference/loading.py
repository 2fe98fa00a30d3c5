"""A model and its tokenizer from wherever they were kept: a checkpoint, a run's folder, a pretrained folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from memtx.checkpoint import pretrained, sharded
from memtx.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import CheckpointError
from memtx.models.memory_transformer import MemoryTransformer

TOKENIZER_FILE = pretrained.SIDECAR_FILES["tokenizer"]
DATA_MODULE_KEY = "BookDataModule"
"""Where a training checkpoint keeps the data module's part, with the tokenizer as JSON text."""


def load_model_and_tokenizer(path: str | os.PathLike[str]) -> tuple[MemoryTransformer, Tokenizer]:
    """Return the model (in eval mode, on the CPU) and the tokenizer kept at ``path``.

    Args:
        path: a training checkpoint (``.ckpt``, a file, or a folder of several processes); a run's folder, of which the
            best checkpoint is taken, else the newest; or a pretrained folder with config.json, model.safetensors and
            tokenizer.json, of ours or of a published decoder.

    Raises:
        CheckpointError: missing, damaged, of something else, or without a tokenizer.
    """
    place = pretrained.resolve_model_path(path)
    if (place / pretrained.CONFIG_FILE).is_file():
        if not (place / TOKENIZER_FILE).is_file():
            raise CheckpointError(
                f"'{place}' has no {TOKENIZER_FILE}.", "Put the tokenizer it was trained with beside it."
            )
        model = MemoryTransformer.from_pretrained(place)
        tokenizer = load_tokenizer(place / TOKENIZER_FILE)
    else:
        model = MemoryTransformer.from_pretrained(place)
        tokenizer = _parse_tokenizer(_read_tokenizer_json(place), place)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"'{place}' has a tokenizer of {tokenizer.vocab_size} tokens and a model of {model.vocab_size}.",
            "They do not belong together; take the tokenizer it was trained with.",
        )
    return model.eval(), tokenizer


def _read_tokenizer_json(path: Path) -> str:
    # The model was loaded from it, so it is whole; mapped, only what is looked at is read a second time.
    shared = sharded.is_sharded(path)
    content = sharded.read_metadata(path) if shared else torch.load(path, "cpu", weights_only=True, mmap=True)
    text = pretrained.sidecars_from_checkpoint(content).get("tokenizer")
    if text is None:
        raise CheckpointError(
            f"'{path}' has no tokenizer in it.", "Give a checkpoint of a run on texts, or a pretrained folder."
        )
    return text


def _parse_tokenizer(text: str, path: Path) -> Tokenizer:
    try:
        return tokenizer_from_json(text)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' has a damaged tokenizer: {error}.", "Restore it from a copy.") from error
