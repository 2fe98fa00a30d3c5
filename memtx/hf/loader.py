"""The layouts of Hugging Face folders, by ``model_type``, and the function that loads a folder of any of them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import cast

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import CheckpointError, MemtxError, closest_match
from memtx.hf.checkpoint import CONFIG_FILE, open_checkpoint, read_config

# model_type is the one name that stands for a class here: the format is not ours.
ENCODERS = {
    "bert": "memtx.hf.bert:build_bert",
    "big_bird": "memtx.hf.bigbird:build",
    "distilbert": "memtx.hf.bert:build_distilbert",
    "longformer": "memtx.hf.longformer:build",
    "reformer": "memtx.hf.reformer:build",
    "transfo-xl": "memtx.hf.transformer_xl:build",
}
DECODERS = {
    "gpt2": "memtx.hf.gpt2:build",
    "llama": "memtx.hf.llama:build",
    "mistral": "memtx.hf.llama:build",
    "qwen2": "memtx.hf.llama:build",
    "qwen3": "memtx.hf.llama:build",
}
MODEL_TYPES = ENCODERS | DECODERS
"""``model_type`` -> "module:function" that builds the model from an :class:`~memtx.hf.checkpoint.HFCheckpoint`."""


def is_hf_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder in a layout of ``transformers``, of any ``model_type``."""
    return (Path(path) / CONFIG_FILE).is_file() and "model_type" in read_config(path)[1]


def load(path: str | os.PathLike[str], window: int | None = None) -> PretrainedModel:
    """Load a Hugging Face folder: a model in eval mode, on the CPU, in the dtype of its weights.

    Args:
        path: Folder with config.json and model.safetensors or pytorch_model.bin.
        window: Exact positions seen by a decoder. Defaults to its trained length, at most 4096. Layers trained with a
            narrower window keep it.

    Raises:
        CheckpointError: The folder is missing, damaged, of an unknown ``model_type``, or has tensors that are missing,
            unknown or of another shape; the error names all of them.
        MemtxError: ``window`` is given for a model that is not a decoder.
    """
    model_type = str(read_config(path)[1].get("model_type"))
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"'{path}' has model_type '{model_type}', known are {', '.join(sorted(MODEL_TYPES))}."
            f"{closest_match(model_type, MODEL_TYPES)}",
            "Give a checkpoint of one of these.",
        )
    if window is not None and model_type not in DECODERS:
        raise MemtxError(f"window ({window}) is given, but '{path}' is no Hugging Face decoder.", "Remove window.")
    module, _, function = MODEL_TYPES[model_type].partition(":")
    build = getattr(importlib.import_module(module), function)
    options = {"window": window} if model_type in DECODERS else {}
    return cast(PretrainedModel, build(open_checkpoint(path), **options))
