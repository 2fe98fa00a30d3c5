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

from memtx.errors import CheckpointError, at_least
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.published.content import Opened
from memtx.models.published.layout import Origin, widest
from memtx.models.published.options import Options
from memtx.models.published.pieces import Piece
from memtx.models.published.stored import Stored, same, whole
from memtx.models.published.unfilled import unfilled

LONGEST = 4096
"""Positions seen unless asked otherwise: the state has room for all of them, in every layer."""

HEAD = "lm_head.weight"


def windows(given: int | None, longest: int, sliding: Sequence[int | None]) -> list[Any]:
    """Return what each layer carries: an exact window.

    Args:
        given: positions seen, as asked for; None for as many as the model knows, up to ``LONGEST``.
        longest: positions that the model knows.
        sliding: of each layer, the window it was trained with; None for all that came before.
    """
    if given is not None:
        at_least(1, window=given)
    window = given if given is not None else min(longest, LONGEST)
    memories = [partial(RecurrentMemory, window=window if own is None else min(own, window)) for own in sliding]
    return memories[:1] if all(one.keywords == memories[0].keywords for one in memories) else memories


def is_tied(found: Opened, default: bool, embedding: str, prefix: str) -> bool:
    """Return whether the head's weights are the embedding's: so in the config, and no other numbers are there."""
    if not Options(found.config).flag("tie_word_embeddings", default):
        return False
    tensors = found.tensors
    table = tensors.get(prefix + embedding, tensors.get(embedding))
    return HEAD not in tensors or (table is not None and same(tensors[HEAD], table))


def build(
    found: Opened,
    make: Callable[..., MemoryTransformer],
    pieces: Mapping[str, Piece],
    prefix: str,
    kept: Sequence[str] = (),
) -> MemoryTransformer:
    """Return the model that ``make`` makes, with the folder's numbers, in the type they are kept in, in eval mode.

    Args:
        found: the folder.
        make: the model's class with all of its arguments.
        pieces: name in the checkpoint -> where its rows stand in the model.
        prefix: what the body's names may lack, where the checkpoint was written without its head.
        kept: patterns of names that belong to no part of the model.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all of them are named.
    """
    dtypes = {name: stored.dtype for name, stored in found.tensors.items() if stored.dtype.is_floating_point}
    with unfilled(widest(dtypes[name] for name in sorted(dtypes)) if dtypes else torch.float32):
        model = make()
    tied = model.head.weight is model.embedding.weight
    bare = not any(name.startswith(prefix) for name in found.tensors)
    pieces = {name.removeprefix(prefix) if bare else name: piece for name, piece in pieces.items()}
    beside = _checked(found, model.state_dict(), pieces, [HEAD] if tied else [], kept)
    present = {name: piece for name, piece in pieces.items() if name in found.tensors}
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, piece in present.items():
        if not (tied and name == HEAD):
            piece.fill(weights, found.tensors[name])
    model.origin = Origin(
        found.text,
        present,
        {name: dtypes[name] for name in present},
        {name: whole(stored) for name, stored in beside.items()},
    )
    return model.eval()


def _checked(
    found: Opened, own: Mapping[str, Tensor], pieces: Mapping[str, Piece], spare: Sequence[str], kept: Sequence[str]
) -> dict[str, Stored]:
    """Return what is kept beside the model.

    Raises:
        CheckpointError: something is missing (but for ``spare``), unknown, or of another shape.
    """
    wrong = [f"lacks {name}" for name in pieces if name not in found.tensors and name not in spare]
    beside = {}
    for name, stored in found.tensors.items():
        if name in pieces:
            expected = pieces[name].shape(own)
            if stored.shape != expected:
                wrong.append(f"has {name} of shape {stored.shape} instead of {expected}")
            elif not stored.dtype.is_floating_point:
                wrong.append(f"has {name} as {stored.dtype}, expected floating point")
        elif any(re.fullmatch(pattern, name) for pattern in kept):
            beside[name] = stored
        else:
            wrong.append(f"has {name}, unknown to the model")
    if wrong:
        raise CheckpointError(
            f"'{found.place}' {'; '.join(wrong)}.",
            "config.json and weights do not belong together, or one was changed.",
        )
    return beside
