"""Layout of a memtx language model as a folder of ``transformers``; models in it are loaded here, without that library.

The folder names a module file of a few lines, which imports memtx, so that the code of the model stays in memtx.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memtx import class_config, files
from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import CheckpointError, MemtxError, check_at_least
from memtx.hf.checkpoint import CONFIG_FILE, SAFETENSORS_FILE, HFCheckpoint
from memtx.hf.layout import KeyMapping, RowSlice, WeightEntry, WeightTransform
from memtx.hf.loader import load_weights
from memtx.layers.lm_head import NoHead
from memtx.models.memory_transformer import MemoryTransformer

MODEL_TYPE = "memtx"
PREFIX = "model."
"""Prefix of the names of the weights: ``MemtxForCausalLM`` has the model as its attribute ``model``."""
SEGMENT_LENGTH = 512
"""Default number of tokens that are read at a time."""

MODULE_NAME = "modeling_memtx"
AUTO_MAP = {"AutoConfig": f"{MODULE_NAME}.MemtxConfig", "AutoModelForCausalLM": f"{MODULE_NAME}.MemtxForCausalLM"}
MODULE_TEXT = '''"""Opens this folder in transformers, where memtx is installed: pip install 'memtx[hf]'."""

from memtx.hf import transformers_model


class MemtxConfig(transformers_model.MemtxConfig):
    """Configuration of the model."""


class MemtxForCausalLM(transformers_model.MemtxForCausalLM):
    """The model; its code is in memtx."""

    config_class = MemtxConfig
'''


def check_language_model(model: nn.Module) -> MemoryTransformer:
    """Return a model that continues texts; raises MemtxError for one of another kind."""
    if not isinstance(model, MemoryTransformer) or isinstance(model.head, NoHead):
        message = f"{type(model).__name__} predicts no next token, so that AutoModelForCausalLM cannot open it."
        hint = "Give a MemoryTransformer or TransformerXL; memtx.hf.save writes a published layout."
        raise MemtxError(message, hint)
    return model


def depends_on_segmentation(model: nn.Module) -> bool:
    """Return whether results of a language model depend on how a stream is split into segments."""
    blocks: Any = check_language_model(model).blocks
    return any(memory.depends_on_segmentation for block in blocks for memory in block.attention.memories)


def tied_aliases(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters, each with the first name."""
    names: dict[int, str] = {}
    pairs = [(name, names.setdefault(id(weight), name)) for name, weight in model.named_parameters("", True, False)]
    return {name: first for name, first in pairs if name != first}


def describe(model: MemoryTransformer, *, segment_length: int = SEGMENT_LENGTH, **options: Any) -> dict[str, Any]:
    """Return the content of config.json; ``options`` are further entries, such as ``eos_token_id``."""
    check_at_least(1, segment_length=segment_length)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MemtxForCausalLM"],
        "auto_map": AUTO_MAP,
        "memtx": model.config,
        "segment_length": segment_length,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.depth,
        "tie_word_embeddings": bool(tied_aliases(model)),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **options,
    }


def write(model: MemoryTransformer, path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write the weights, with LoRA adapters merged, config.json and the module file into a folder."""
    aliases = tied_aliases(model)
    weights = {PREFIX + name: value for name, value in model.merged_state_dict().items() if name not in aliases}
    # transformers requires the format "pt" in the header, which save_tensors writes.
    files.save_tensors(Path(path) / SAFETENSORS_FILE, weights, kind="transformers", version=1)
    files.write_json(Path(path) / CONFIG_FILE, config)
    write_module(path)


def write_module(path: str | os.PathLike[str]) -> None:
    """Write the module file that ``auto_map`` names."""
    files.write_text(Path(path) / f"{MODULE_NAME}.py", MODULE_TEXT)


def build(hf_checkpoint: HFCheckpoint) -> PretrainedModel:
    """Build the model of a folder that :func:`write`, ``Trainer`` or ``save_pretrained`` wrote, and load its weights.

    Raises CheckpointError if the folder is damaged, or names a class that is not trusted.
    """
    description = hf_checkpoint.config.get("memtx")
    if not isinstance(description, Mapping) or "class_path" not in description:
        raise CheckpointError(f"'{hf_checkpoint.path}' has no memtx entry in its config.json.", "Restore config.json.")
    factory = class_config.from_config(description)
    aliases: dict[str, str] = {}

    def make_model() -> MemoryTransformer:
        model = check_language_model(factory())
        aliases.update(tied_aliases(model))
        return model

    def make_entries(weights: Mapping[str, Tensor]) -> Sequence[WeightEntry]:
        return [
            (WeightTransform((RowSlice(name),)), [name, *(alias for alias, first in aliases.items() if first == name)])
            for name in weights
        ]

    return load_weights(make_model, hf_checkpoint, KeyMapping(prefix=PREFIX), make_entries)
