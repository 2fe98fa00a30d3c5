"""What the layouts of decoders share: a model of no numbers is filled from disk, all or nothing; how much it sees.

The model is made without its numbers, every name and shape is compared, and only then each tensor is read
to its own place: at no time is more than the weights and a piece of one tensor held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memtx.errors import CheckpointError, check_at_least
from memtx.hf.checkpoint import LazyCheckpoint
from memtx.hf.layout import HFOrigin, promote_dtypes
from memtx.hf.lazy_tensors import LazyTensor, materialize, tensors_equal
from memtx.hf.options import HFConfig
from memtx.hf.skip_init import skip_init
from memtx.hf.weight_transforms import WeightTransform
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer

DEFAULT_MAX_WINDOW = 4096
"""Positions seen unless asked otherwise: the state has room for all of them, in every layer."""

LM_HEAD_KEY = "lm_head.weight"


def build_window_memories(
    requested_window: int | None, max_length: int, sliding_windows: Sequence[int | None]
) -> list[Any]:
    """Return what each layer carries: an exact window.

    Args:
        requested_window: positions seen, as asked for; None for as many as the model knows, up to
            ``DEFAULT_MAX_WINDOW``.
        max_length: positions that the model knows.
        sliding_windows: of each layer, the window it was trained with; None for all that came before.
    """
    if requested_window is not None:
        check_at_least(1, window=requested_window)
    window = requested_window if requested_window is not None else min(max_length, DEFAULT_MAX_WINDOW)
    memories = [partial(RecurrentMemory, window=window if own is None else min(own, window)) for own in sliding_windows]
    return memories[:1] if all(one.keywords == memories[0].keywords for one in memories) else memories


def has_tied_embeddings(hf_checkpoint: LazyCheckpoint, default: bool, embedding: str, prefix: str) -> bool:
    """Return whether the head's weights are the embedding's: so in the config, and no other numbers are there."""
    if not HFConfig(hf_checkpoint.config).get_bool("tie_word_embeddings", default):
        return False
    tensors = hf_checkpoint.tensors
    table = tensors.get(prefix + embedding, tensors.get(embedding))
    return LM_HEAD_KEY not in tensors or (table is not None and tensors_equal(tensors[LM_HEAD_KEY], table))


def build(
    hf_checkpoint: LazyCheckpoint,
    model_factory: Callable[..., MemoryTransformer],
    transforms: Mapping[str, WeightTransform],
    prefix: str,
    extra_patterns: Sequence[str] = (),
) -> MemoryTransformer:
    """Return the model that ``model_factory`` makes, with the folder's numbers, in their type and in eval mode.

    Args:
        hf_checkpoint: the folder.
        model_factory: the model's class with all of its arguments.
        transforms: name in the checkpoint -> where its rows stand in the model.
        prefix: what the body's names may lack, where the checkpoint was written without its head.
        extra_patterns: patterns of names that belong to no part of the model.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all of them are named.
    """
    dtypes = {name: stored.dtype for name, stored in hf_checkpoint.tensors.items() if stored.dtype.is_floating_point}
    with skip_init(promote_dtypes(dtypes[name] for name in sorted(dtypes)) if dtypes else torch.float32):
        model = model_factory()
    tied = model.head.weight is model.embedding.weight
    bare = not any(name.startswith(prefix) for name in hf_checkpoint.tensors)
    transforms = {name.removeprefix(prefix) if bare else name: piece for name, piece in transforms.items()}
    beside = _check_tensors(
        hf_checkpoint, model.state_dict(), transforms, [LM_HEAD_KEY] if tied else [], extra_patterns
    )
    present = {name: piece for name, piece in transforms.items() if name in hf_checkpoint.tensors}
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, piece in present.items():
        if not (tied and name == LM_HEAD_KEY):
            piece.load_into(weights, hf_checkpoint.tensors[name])
    model.hf_origin = HFOrigin(
        hf_checkpoint.config_text,
        present,
        {name: dtypes[name] for name in present},
        {name: materialize(stored) for name, stored in beside.items()},
    )
    return model.eval()


def _check_tensors(
    hf_checkpoint: LazyCheckpoint,
    state_dict: Mapping[str, Tensor],
    transforms: Mapping[str, WeightTransform],
    optional_keys: Sequence[str],
    extra_patterns: Sequence[str],
) -> dict[str, LazyTensor]:
    """Return what is kept beside the model.

    Raises:
        CheckpointError: something is missing (but for ``optional_keys``), unknown, or of another shape.
    """
    wrong = [f"lacks {name}" for name in transforms if name not in hf_checkpoint.tensors and name not in optional_keys]
    beside = {}
    for name, stored in hf_checkpoint.tensors.items():
        if name in transforms:
            expected = transforms[name].checkpoint_shape(state_dict)
            if stored.shape != expected:
                wrong.append(f"has {name} of shape {stored.shape} instead of {expected}")
            elif not stored.dtype.is_floating_point:
                wrong.append(f"has {name} as {stored.dtype}, expected floating point")
        elif any(re.fullmatch(pattern, name) for pattern in extra_patterns):
            beside[name] = stored
        else:
            wrong.append(f"has {name}, unknown to the model")
    if wrong:
        raise CheckpointError(
            f"'{hf_checkpoint.path}' {'; '.join(wrong)}.",
            "config.json and weights do not belong together, or one was changed.",
        )
    return beside
