"""Tensors by name: from a checkpoint's names to a model's own, every misfit named and nothing half-loaded; and back.

A layout says for each of the model's parts where the checkpoint keeps it. What the checkpoint holds beside the model,
such as a table of positions that is no weight, is kept as it is, so that what is written equals what was read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtx.checkpoint import pretrained
from memtx.errors import CheckpointError, MemtxError
from memtx.hf import checkpoint
from memtx.hf.checkpoint import Checkpoint
from memtx.hf.weight_transforms import WeightTransform


@dataclass(frozen=True)
class KeyMapping:
    """Where a checkpoint keeps a model's weights.

    Attributes:
        hf_keys: a part of the model -> the names it may have in the checkpoint, the one that counts first; ``{}``
            stands for a number such as a layer's, and a part is a module's path or a whole parameter's name.
        prefix: what the body's names begin with when the checkpoint holds a head too; ``hf_keys`` has them without it.
        head_prefixes: what the names of heads begin with, which never bear the prefix.
        extra_patterns: patterns of names (without prefix) that belong to the layout but to no part of the model.
        legacy_suffixes: older ends of names and what they are called now.
    """

    hf_keys: Mapping[str, Sequence[str]]
    prefix: str = ""
    head_prefixes: tuple[str, ...] = ()
    extra_patterns: Sequence[str] = ()
    legacy_suffixes: Mapping[str, str] = field(default_factory=dict)

    def normalize_key(self, key: str) -> str:
        """Return the name that ``hf_keys`` knows a tensor of the checkpoint by."""
        key = key.removeprefix(self.prefix)
        for old, new in self.legacy_suffixes.items():
            if key.endswith(old):
                return key.removesuffix(old) + new
        return key

    def candidate_keys(self, parameter_name: str) -> list[str]:
        """Return the names that the model's tensor ``parameter_name`` may have in the checkpoint."""
        if parameter_name in self.hf_keys:
            return list(self.hf_keys[parameter_name])
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", parameter_name)
        general = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", parameter_name)
        stem, _, last = general.rpartition(".")
        if general in self.hf_keys:
            return [name.format(*numbers) for name in self.hf_keys[general]]
        assert stem in self.hf_keys, f"the layout does not say where {parameter_name} is kept"
        return [f"{name.format(*numbers)}.{last}" for name in self.hf_keys[stem]]


@dataclass(frozen=True)
class HFOrigin:
    """What a model was read from, so that it can be written back.

    Attributes:
        config_text: config.json, word for word.
        transforms: name in the checkpoint -> what of the model is kept under it.
        dtypes: name in the checkpoint -> type on disk.
        extra_tensors: what belongs to no part of the model, by name.
    """

    config_text: str
    transforms: Mapping[str, WeightTransform]
    dtypes: Mapping[str, torch.dtype]
    extra_tensors: Mapping[str, Tensor]


class HFCompatibleModel(pretrained.PretrainedModel):
    """A model that may have been read from the layout of the ``transformers`` library."""

    hf_origin: HFOrigin | None = None

    def export_hf(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as they are now in the layout the model was read from, config.json word for word.

        Args:
            path: a folder; config.json and model.safetensors in it are replaced.

        Raises:
            MemtxError: the model was not read from such a folder, or this one cannot be written to.
        """
        origin = self.hf_origin
        if origin is None:
            raise MemtxError(
                f"This {type(self).__name__} was not read from a published checkpoint.",
                "save_pretrained writes a model of our own.",
            )
        weights = self.merged_state_dict()
        tensors = {name: piece.export(weights).to(origin.dtypes[name]) for name, piece in origin.transforms.items()}
        checkpoint.write(path, origin.config_text, {**origin.extra_tensors, **tensors})


def has_tied_weights(hf_checkpoint: Checkpoint, mapping: KeyMapping, head: str, embedding: str) -> bool:
    """Return whether a head's weights are the embedding's: the config allows it, and no other numbers are there."""
    if hf_checkpoint.config.get("tie_word_embeddings") is False:
        return False
    tensors = {mapping.normalize_key(name): tensor for name, tensor in hf_checkpoint.tensors.items()}
    return head not in tensors or (embedding in tensors and _tensors_equal(tensors[head], tensors[embedding]))


def _tensors_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def load_weights(model: HFCompatibleModel, hf_checkpoint: Checkpoint, mapping: KeyMapping) -> None:
    """Fill the model with the checkpoint's tensors, all or none, in the type they are kept in.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all of them are named.
    """
    own = model.state_dict()
    by_modern = {mapping.normalize_key(name): name for name in hf_checkpoint.tensors}
    twice = sorted(set(hf_checkpoint.tensors) - set(by_modern.values()))
    names: dict[str, WeightTransform] = {}
    kept: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    wrong = [f"has {name} under two names" for name in twice]
    known: set[str] = set()
    for part, tensor in own.items():
        places = mapping.candidate_keys(part)
        known.update(places)
        present = [by_modern[place] for place in places if place in by_modern]
        if not present:
            whole = _has_prefix(hf_checkpoint, mapping) and not places[0].startswith(mapping.head_prefixes)
            wrong.append(f"lacks {mapping.prefix if whole else ''}{places[0]}")
            continue
        given = hf_checkpoint.tensors[present[0]]
        if given.shape != tensor.shape:
            wrong.append(f"has {present[0]} of shape {tuple(given.shape)} instead of {tuple(tensor.shape)}")
            continue
        weights[part] = given
        for name in present:
            # The same numbers under two names are one weight; other numbers are something that the model does not use.
            if name in present[:1] or _tensors_equal(hf_checkpoint.tensors[name], given):
                names[name] = WeightTransform.from_rows(part)
            else:
                kept[name] = hf_checkpoint.tensors[name]
    for modern, name in by_modern.items():
        if modern in known:
            continue
        if any(re.fullmatch(pattern, modern) for pattern in mapping.extra_patterns):
            kept[name] = hf_checkpoint.tensors[name]
        else:
            wrong.append(f"has {name}, unknown to the model")
    if wrong:
        raise CheckpointError(
            f"'{hf_checkpoint.path}' {'; '.join(wrong)}.",
            "config.json and weights do not belong together, or one was changed.",
        )
    dtypes = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
    if dtypes:
        model.to(promote_dtypes(dtypes))
    model.load_state_dict(weights)
    # A name may be one part's second choice and another's first.
    kept = {name: tensor for name, tensor in kept.items() if name not in names}
    model.hf_origin = HFOrigin(
        hf_checkpoint.config_text, names, {name: hf_checkpoint.tensors[name].dtype for name in names}, kept
    )
    model.eval()


def _has_prefix(hf_checkpoint: Checkpoint, mapping: KeyMapping) -> bool:
    return any(name.startswith(mapping.prefix) for name in hf_checkpoint.tensors)


def promote_dtypes(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that holds numbers of all these types."""
    widest, *others = dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    return widest
