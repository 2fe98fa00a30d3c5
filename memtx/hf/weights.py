"""Weights of a Hugging Face folder read into a model, all or nothing, and written back byte for byte.

The model is built with uninitialized weights, every name and shape is compared, and only then each tensor is read to
its destination: memory never holds more than the weights and a chunk of one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memtx.checkpoint.pretrained import PretrainedModel, describe_mismatches, drop_tied_aliases
from memtx.errors import CheckpointError, MemtxError
from memtx.hf.checkpoint import HFCheckpoint, LazyTensor, materialize, tensors_equal, write_checkpoint
from memtx.hf.config import HFConfig
from memtx.hf.layout import KeyMapping, WeightEntry, WeightTransform
from memtx.hf.loader import is_hf_folder, load

ModelT = TypeVar("ModelT", bound=PretrainedModel)


@dataclass(frozen=True)
class HFOrigin:
    """Everything beside the weights that :func:`save` needs to write a model back.

    Attributes:
        config_text: Text of config.json.
        transforms: Name in the checkpoint -> the model's tensors stored under it.
        dtypes: Name in the checkpoint -> dtype on disk.
        extra_tensors: Tensors that belong to no part of the model, by name.
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
    """Return a model with the weights of a folder, in their dtype and in eval mode.

    Args:
        model_factory: Returns the model; its random initialization is skipped.
        hf_checkpoint: The folder.
        mapping: Names of the layout.
        build_entries: Returns the correspondence of the tensors, given the model's. Defaults to ``mapping.entries``.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape or dtype; the error names all of them.
    """
    tensors = hf_checkpoint.tensors
    names = {mapping.normalize_key(name): name for name in tensors}
    dtypes = [
        tensors[name].dtype
        for key, name in names.items()
        if tensors[name].dtype.is_floating_point and not mapping.is_extra(key)
    ]
    with _skip_init(reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()):
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
    """Return the tensors to read, those to write back, and the extra ones, each by name in the checkpoint.

    Args:
        hf_checkpoint: The folder.
        names: Normalized name -> name in the checkpoint.
        mapping: Names of the layout.
        entries: Correspondence of the tensors.
        weights: Tensors of the model by name.

    Raises:
        CheckpointError: Something does not fit.
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
            # Equal values under two names are one weight; other values are a tensor that the model does not use.
            if tensors_equal(tensors[name], tensors[first]):
                duplicates[name] = transform
            else:
                unused.add(name)
    transforms = duplicates | sources
    extra = {
        name: tensors[name]
        for key, name in names.items()
        if name not in transforms and (name in unused or mapping.is_extra(key))
    }
    problems = [f"has {name} under two names" for name in sorted(tensors.keys() - set(names.values()))]
    problems += describe_mismatches(
        {name: transform.checkpoint_shape(weights) for name, transform in sources.items()},
        {
            name: tensors[name].shape
            for name in names.values()
            if name in sources or (name not in duplicates and name not in extra)
        },
    )
    problems += [
        f"has {name} as {tensors[name].dtype}, expected floating point"
        for name in sources
        if name in tensors and not tensors[name].dtype.is_floating_point
    ]
    if problems:
        raise CheckpointError(
            f"'{hf_checkpoint.path}' {'; '.join(problems)}.", "Its config.json and weights do not belong together."
        )
    return sources, transforms, extra


def has_tied_weights(
    hf_checkpoint: HFCheckpoint, mapping: KeyMapping, head: str, embedding: str, *, default: bool = True
) -> bool:
    """Return whether a head shares the embedding's weights: the config ties them and the folder does not contradict.

    Args:
        hf_checkpoint: The folder.
        mapping: Names of the layout.
        head: Normalized name of the head's weights.
        embedding: Normalized name of the embedding's weights.
        default: Value of a missing ``tie_word_embeddings``.
    """
    if not HFConfig(hf_checkpoint.config).get_bool("tie_word_embeddings", default):
        return False
    tensors = {mapping.normalize_key(name): tensor for name, tensor in hf_checkpoint.tensors.items()}
    return head not in tensors or (embedding in tensors and tensors_equal(tensors[head], tensors[embedding]))


def save(
    model: PretrainedModel, path: str | os.PathLike[str], *, layout: str | os.PathLike[str] | None = None
) -> list[str]:
    """Write a model's present weights into a folder in a Hugging Face layout, with the layout's config.json unchanged.

    Args:
        model: The model, with LoRA adapters merged.
        path: Folder; its config.json and model.safetensors are replaced.
        layout: Hugging Face folder of a model of equal shape. Defaults to the one that ``model`` was loaded from.

    Returns:
        Names of the model's weights that the layout cannot hold, such as those of added memories.

    Raises:
        CheckpointError: The model does not have the layout.
        MemtxError: The model was not loaded from a Hugging Face folder, or ``path`` cannot be written.
    """
    template: PretrainedModel = model
    if layout is not None:
        if not is_hf_folder(layout):
            raise CheckpointError(f"'{layout}' is no Hugging Face folder.", "Give the one that training started from.")
        template = load(layout)
    origin = template.hf_origin
    if not isinstance(origin, HFOrigin):
        raise MemtxError(
            f"This {type(model).__name__} was not loaded from a Hugging Face folder.",
            "Use save_pretrained, or give a layout.",
        )
    weights = model.merged_state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()}
    actual = {name: tuple(weights[name].shape) for name in expected if name in weights}
    if layout is not None and (problems := describe_mismatches(expected, actual)):
        raise CheckpointError(
            f"The model does not have the layout of '{layout}': it {'; it '.join(problems[:3])}.",
            "Give the folder that training started from.",
        )
    tensors = {name: source.export(weights).to(origin.dtypes[name]) for name, source in origin.transforms.items()}
    write_checkpoint(path, origin.config_text, {**origin.extra_tensors, **tensors})
    # By address: tied weights have several names.
    stored = {weights[rows.name].data_ptr() for source in origin.transforms.values() for rows in source.slices}
    return sorted(name for name, tensor in weights.items() if tensor.data_ptr() not in stored)


_INIT_FUNCTIONS = {
    # Both forms: some functions of nn.init dispatch as themselves.
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
