"""A folder in the layout of the ``transformers`` library, or of our own format: the right reader for each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from memtx.checkpoint import pretrained
from memtx.errors import CheckpointError, MemtxError, closest_match
from memtx.hf import checkpoint
from memtx.hf.checkpoint import Checkpoint, LazyCheckpoint
from memtx.hf.layout import HFCompatibleModel

# The one table of names that stand for classes: model_type is someone else's format.
ENCODERS = {
    "bert": "memtx.hf.bert",
    "big_bird": "memtx.hf.bigbird",
    "distilbert": "memtx.hf.distilbert",
    "longformer": "memtx.hf.longformer",
    "reformer": "memtx.hf.reformer",
    "transfo-xl": "memtx.hf.transformer_xl",
}
DECODERS = {
    "gpt2": "memtx.hf.gpt2",
    "llama": "memtx.hf.llama",
    "mistral": "memtx.hf.llama",
    "qwen2": "memtx.hf.llama",
    "qwen3": "memtx.hf.llama",
}
MODEL_TYPES = ENCODERS | DECODERS


def is_hf_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder in the layout of the ``transformers`` library, of whatever kind."""
    return (Path(path) / checkpoint.CONFIG_FILE).is_file() and "model_type" in checkpoint.read_config(path)[1]


def from_pretrained(path: str | os.PathLike[str], window: int | None = None) -> nn.Module:
    """Build the model kept at ``path``, in eval mode, on the CPU, in the type its weights are kept in.

    Args:
        path: a folder of ours, a training checkpoint file, or a folder in the layout of the ``transformers`` library
            (config.json with a ``model_type``, beside model.safetensors or pytorch_model.bin).
        window: of a published decoder alone, exact positions seen; by default those it was trained with, at most 4096.
            Layers that were trained with a narrower window keep it.

    Raises:
        CheckpointError: missing, damaged, of an unknown ``model_type``, or with tensors that are missing, unknown or
            of another shape; all of them are named.
        MemtxError: a window for a model that has its own.
    """
    place = Path(path)
    kind = str(checkpoint.read_config(place)[1]["model_type"]) if is_hf_checkpoint(place) else None
    if kind in DECODERS:
        decoder = importlib.import_module(DECODERS[kind])
        return cast(Callable[[LazyCheckpoint, int | None], HFCompatibleModel], decoder.build)(
            checkpoint.open_lazy(place), window
        )
    if kind is not None and kind not in MODEL_TYPES:
        raise CheckpointError(
            f"'{place}' has model_type '{kind}', known are {', '.join(sorted(MODEL_TYPES))}."
            f"{closest_match(kind, MODEL_TYPES)}",
            "Give a checkpoint of one of these.",
        )
    if window is not None:
        raise MemtxError(
            f"window is {window}, but '{place}' is no published decoder.",
            "Leave it out; with_memory gives a memory transformer another one.",
        )
    if kind is None:
        return pretrained.load(place)
    module = importlib.import_module(ENCODERS[kind])
    return cast(Callable[[Checkpoint], HFCompatibleModel], module.build)(checkpoint.read(place))
