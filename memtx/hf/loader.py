"""Load Hugging Face folders into models, all or nothing, and write them back byte for byte.

A model is built with uninitialized weights, every name and shape is checked, and only then is each tensor read to its
destination, so memory never holds more than the weights and a chunk of one tensor.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memtx.checkpoint.pretrained import PretrainedModel, describe_mismatches, drop_tied_aliases
from memtx.errors import CheckpointError, MemtxError, closest_match
from memtx.hf.checkpoint import (
    CONFIG_FILE,
    HFCheckpoint,
    LazyTensor,
    materialize,
    open_checkpoint,
    read_config,
    tensors_equal,
    write_checkpoint,
)
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping, WeightEntry, WeightTransform

ModelT = TypeVar("ModelT", bound=PretrainedModel)
logger = logging.getLogger(__name__)

# Only here does a short name, model_type, select a class: Hugging Face defines the format.
ENCODERS = {
    "bert": "memtx.hf.bert:build_bert",
    "big_bird": "memtx.hf.sparse_encoders:build_bigbird",
    "bigbird_pegasus": "memtx.hf.bigbird_pegasus:build",
    "distilbert": "memtx.hf.bert:build_distilbert",
    "led": "memtx.hf.led:build",
    "longformer": "memtx.hf.sparse_encoders:build_longformer",
    "reformer": "memtx.hf.reformer:build",
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "memtx.hf.bert:build_roberta"),
    "transfo-xl": "memtx.hf.transformer_xl:build",
    "xlnet": "memtx.hf.xlnet:build",
}
BIDIRECTIONAL_ENCODERS = ENCODERS.keys() - {"bigbird_pegasus", "led", "reformer", "transfo-xl"}
"""Encoders that continue no text: they serve a task alone."""
DECODERS = {
    "gemma3_text": "memtx.hf.gemma3:build",
    "gpt2": "memtx.hf.gpt2:build",
    "llama": "memtx.hf.llama:build",
    "mistral": "memtx.hf.llama:build",
    "phi3": "memtx.hf.phi3:build",
    "smollm3": "memtx.hf.llama:build",
    "olmo_hybrid": "memtx.hf.hybrid:build_olmo_hybrid",
    "qwen2": "memtx.hf.llama:build",
    "qwen3": "memtx.hf.llama:build",
    "qwen3_5_text": "memtx.hf.hybrid:build_qwen3_5",
    "qwen3_next": "memtx.hf.hybrid:build_qwen3_next",
}
TEXT_PARTS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
"""Type of a model of text and images -> type of its text part, whose config is ``text_config``."""
MODEL_TYPES = (
    ENCODERS
    | DECODERS
    | {"memtx": "memtx.hf.exported:build"}
    | {name: DECODERS[part] for name, part in TEXT_PARTS.items()}
)
"""``model_type`` -> "module:function" that builds the model from an :class:`~memtx.hf.checkpoint.HFCheckpoint`."""


QUANTIZATION_KEYS = ("quantization_config", "compression_config")
BITSANDBYTES_KEYS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
QUANTIZER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of quantizers that write nothing to config.json: AutoGPTQ, AutoAWQ and ModelOpt."""


def is_hf_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a folder in a ``transformers`` layout, with any ``model_type``."""
    return (Path(path) / CONFIG_FILE).is_file() and "model_type" in read_config(path)[1]


def load(path: str | os.PathLike[str], window: int | None = None) -> PretrainedModel:
    """Load a Hugging Face folder as a model in eval mode, on the CPU, in the dtype of its weights.

    Args:
        path: Folder with config.json and model.safetensors or pytorch_model.bin.
        window: Number of exact positions visible to a decoder. Defaults to its trained length. Layers trained with
            a narrower window keep it. With LongRoPE (Phi-3), one of at most the original length takes the short
            factors, as ``transformers`` does for texts of that length, and a longer one the long factors.

    Raises:
        CheckpointError: The folder is missing or damaged, its ``model_type`` is unknown, or tensors are missing,
            unknown or of another shape; the error names all of them.
        MemtxError: ``window`` is given for a model that is not a decoder.
    """
    config = read_config(path)[1]
    _reject_quantized(Path(path), config)
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_TYPES:
        message = f"'{path}' has model_type '{model_type}', expected one of {', '.join(sorted(MODEL_TYPES))}."
        message += closest_match(model_type, MODEL_TYPES)
        raise CheckpointError(message, "Give a checkpoint of a supported type.")
    is_decoder = model_type in DECODERS or model_type in TEXT_PARTS
    if window is not None and not is_decoder:
        raise MemtxError(f"window ({window}) is given, but '{path}' is not a Hugging Face decoder.", "Remove window.")
    module, _, function = MODEL_TYPES[model_type].partition(":")
    build = getattr(importlib.import_module(module), function)
    options = {"window": window} if is_decoder else {}
    return cast(PretrainedModel, build(_select_text_part(open_checkpoint(path)), **options))


def _reject_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    settings = [(key, part[key]) for part in parts for key in QUANTIZATION_KEYS if _quantizes(part.get(key))]
    reasons = [
        f"it has {name} in place of a quantization_config" for name in QUANTIZER_FILES if (folder / name).is_file()
    ]
    for key, value in settings:
        method = value.get("quant_method") or value.get("format") if isinstance(value, Mapping) else None
        reasons.insert(0, f"config.json has {key} with quant_method '{method or 'unknown'}'")
    if reasons:
        message = f"'{folder}' holds quantized weights: {reasons[0]}."
        raise CheckpointError(message, "Give the original folder, in bfloat16, float16 or float32.")


def _quantizes(setting: object) -> bool:
    """Return whether a quantization_config changes any weight: bitsandbytes' may have both of its switches off."""
    switches = [setting[key] for key in BITSANDBYTES_KEYS if key in setting] if isinstance(setting, Mapping) else []
    return any(switches) if switches else bool(setting)


def _select_text_part(hf_checkpoint: HFCheckpoint) -> HFCheckpoint:
    """Return the checkpoint with the config of its text part, if the model reads images too."""
    part = TEXT_PARTS.get(str(hf_checkpoint.config["model_type"]))
    if part is None:
        return hf_checkpoint
    text_config = hf_checkpoint.config.get("text_config")
    if not isinstance(text_config, dict):
        raise CheckpointError(f"'{hf_checkpoint.path}' has no text_config.", "Restore config.json.")
    tied = {key: value for key, value in hf_checkpoint.config.items() if key == "tie_word_embeddings"}
    logger.warning("'%s' reads text and images; only its text part is used.", hf_checkpoint.path)
    return replace(hf_checkpoint, config={**tied, **text_config, "model_type": part})


@dataclass(frozen=True)
class HFOrigin:
    """Everything besides the weights that :func:`save` needs to write a model back.

    Attributes:
        config_text: Text of config.json.
        transforms: Name in the checkpoint -> the model's tensors stored under it.
        dtypes: Name in the checkpoint -> dtype on disk.
        extra_tensors: Tensors that the model does not use, by name.
    """

    config_text: str
    transforms: Mapping[str, WeightTransform]
    dtypes: Mapping[str, torch.dtype]
    extra_tensors: Mapping[str, Tensor]


def load_weights(
    model_factory: Callable[[], ModelT],
    hf_checkpoint: HFCheckpoint,
    mapping: KeyMapping,
    build_entries: Callable[[Mapping[str, Tensor]], Sequence[WeightEntry]] | None = None,
) -> ModelT:
    """Build a model and load the weights of a folder, in their dtype and in eval mode.

    Args:
        model_factory: Returns the model; its random initialization is skipped.
        hf_checkpoint: Content of the folder.
        mapping: Names of the layout.
        build_entries: Returns the checkpoint's entries, given the model's tensors. Defaults to ``mapping.entries``.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape or dtype; the error names all of them.
    """
    tensors = hf_checkpoint.tensors
    names = {mapping.normalize_key(name): name for name in tensors}
    dtypes = [tensors[name].dtype for key, name in names.items() if not mapping.is_extra(key)]
    float_dtypes = [dtype for dtype in dtypes if dtype.is_floating_point]
    with _skip_init(reduce(torch.promote_types, float_dtypes) if float_dtypes else torch.get_default_dtype()):
        model = model_factory()
    weights = drop_tied_aliases(model.state_dict())
    entries = (build_entries or mapping.entries)(weights)
    sources, transforms, extra = _match_tensors(hf_checkpoint, names, mapping, entries, weights)
    for name, transform in sources.items():
        transform.load_into(weights, tensors[name])
    model.hf_origin = HFOrigin(
        hf_checkpoint.config_text,
        transforms,
        {name: tensors[name].dtype for name in transforms},
        {name: materialize(tensor) for name, tensor in extra.items()},
    )
    return model.eval()


def _match_tensors(
    hf_checkpoint: HFCheckpoint,
    names: Mapping[str, str],
    mapping: KeyMapping,
    entries: Sequence[WeightEntry],
    weights: Mapping[str, Tensor],
) -> tuple[dict[str, WeightTransform], dict[str, WeightTransform], dict[str, LazyTensor]]:
    """Return the tensors to read, to write back, and to keep unused, each by name in the checkpoint.

    ``names`` maps normalized names to names in the checkpoint. Raises CheckpointError if anything does not fit.
    """
    tensors = hf_checkpoint.tensors
    has_prefix = any(name.startswith(mapping.prefix) for name in tensors)
    sources: dict[str, WeightTransform] = {}
    duplicates: dict[str, WeightTransform] = {}
    unused: set[str] = set()
    for transform, keys in entries:
        first, *others = [names[key] for key in keys if key in names] or [
            f"{mapping.prefix if has_prefix and not keys[0].startswith(mapping.head_prefixes) else ''}{keys[0]}"
        ]
        sources[first] = transform
        for name in others:
            # Equal values under two names are one weight; a tensor with other values is unused.
            if tensors_equal(tensors[name], tensors[first]):
                duplicates[name] = transform
            else:
                unused.add(name)
    transforms = duplicates | sources
    extra_names = {name for key, name in names.items() if name in unused or mapping.is_extra(key)} - transforms.keys()
    expected_shapes = {name: transform.checkpoint_shape(weights) for name, transform in sources.items()}
    ignored = (duplicates.keys() | extra_names) - sources.keys()
    problems = [f"has {name} under two names" for name in sorted(tensors.keys() - set(names.values()))]
    problems += describe_mismatches(
        expected_shapes, {name: tensors[name].shape for name in names.values() if name not in ignored}
    )
    problems += [
        f"has {name} as {tensors[name].dtype}, expected floating point"
        for name in sources
        if name in tensors and not tensors[name].dtype.is_floating_point
    ]
    if problems:
        message = f"'{hf_checkpoint.path}' {'; '.join(problems)}."
        raise CheckpointError(message, "Use the config.json that belongs to these weights.")
    extra = {name: tensors[name] for name in names.values() if name in extra_names}
    return sources, transforms, extra


def has_tied_weights(
    hf_checkpoint: HFCheckpoint, mapping: KeyMapping, head: str, embedding: str, *, default: bool = True
) -> bool:
    """Return whether a head shares the embedding's weights: the config ties them and stored values do not differ.

    ``head`` and ``embedding`` are normalized names of weights; ``default`` replaces a missing ``tie_word_embeddings``.
    """
    if not HFConfig(hf_checkpoint.config).get_bool("tie_word_embeddings", default):
        return False
    tensors = {mapping.normalize_key(name): tensor for name, tensor in hf_checkpoint.tensors.items()}
    return head not in tensors or (embedding in tensors and tensors_equal(tensors[head], tensors[embedding]))


def save(
    model: PretrainedModel, path: str | os.PathLike[str], *, layout: str | os.PathLike[str] | None = None
) -> list[str]:
    """Write a model's current weights to a folder in a Hugging Face layout, with the layout's config.json unchanged.

    Args:
        model: Model to save; LoRA adapters are merged.
        path: Folder to write to; its config.json and model.safetensors are replaced.
        layout: Hugging Face folder of a model with equal shapes. Defaults to the folder ``model`` was loaded from.

    Returns:
        Names of the model's weights that the layout cannot hold, such as those of added memories.

    Raises:
        CheckpointError: The model does not have the layout.
        MemtxError: The model was not loaded from a Hugging Face folder, or ``path`` cannot be written.
    """
    template: PretrainedModel = model
    if layout is not None:
        if not is_hf_folder(layout):
            raise CheckpointError(f"'{layout}' is not a Hugging Face folder.", "Give the one training started from.")
        template = load(layout)
    origin = template.hf_origin
    if not isinstance(origin, HFOrigin):
        message = f"This {type(model).__name__} was not loaded from a Hugging Face folder."
        raise MemtxError(message, "Use save_pretrained, or give a layout.")
    weights = model.merged_state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()}
    actual = {name: tuple(weights[name].shape) for name in expected if name in weights}
    if layout is not None and (problems := describe_mismatches(expected, actual)):
        message = f"The model does not have the layout of '{layout}': it {'; it '.join(problems[:3])}."
        raise CheckpointError(message, "Give the folder training started from.")
    tensors = {name: source.export(weights).to(origin.dtypes[name]) for name, source in origin.transforms.items()}
    write_checkpoint(path, origin.config_text, {**origin.extra_tensors, **tensors})
    # Compared by address, since tied weights have several names.
    stored = {weights[part.name].data_ptr() for source in origin.transforms.values() for part in source.slices}
    return sorted(name for name, tensor in weights.items() if tensor.data_ptr() not in stored)


_INIT_FUNCTIONS = {
    # Both forms, since some functions of nn.init dispatch as themselves.
    *(Tensor.normal_, Tensor.uniform_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
}


class _SkipInitMode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {**(kwargs or {})}
        return (args[0] if args else kwargs["tensor"]) if func in _INIT_FUNCTIONS else func(*args, **kwargs)


@contextmanager
def _skip_init(dtype: torch.dtype) -> Iterator[None]:
    """Create modules in ``dtype`` without their random initialization.

    The meta device would need ``to_empty``, which unties weights and clears buffers; ``torch.nn.utils.skip_init`` needs
    modules with a ``device`` argument.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _SkipInitMode():
            yield
    finally:
        torch.set_default_dtype(default)
