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

from memtx.errors import CheckpointError, MemtxError
from memtx.models import folder
from memtx.models.published import content
from memtx.models.published.content import Content
from memtx.models.published.pieces import Piece


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps a model's weights.

    Attributes:
        parts: a part of the model -> the names it may have in the checkpoint, the one that counts first; ``{}``
            stands for a number such as a layer's, and a part is a module's path or a whole parameter's name.
        prefix: what the body's names begin with when the checkpoint holds a head too; ``parts`` has them without it.
        heads: what the names of heads begin with, which never bear the prefix.
        kept: patterns of names (without prefix) that belong to the layout but to no part of the model.
        spellings: older ends of names and what they are called now.
    """

    parts: Mapping[str, Sequence[str]]
    prefix: str = ""
    heads: tuple[str, ...] = ()
    kept: Sequence[str] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)

    def modern(self, name: str) -> str:
        """Return the name that ``parts`` knows a tensor of the checkpoint by."""
        name = name.removeprefix(self.prefix)
        for old, new in self.spellings.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def names(self, own: str) -> list[str]:
        """Return the names that the model's tensor ``own`` may have in the checkpoint."""
        if own in self.parts:
            return list(self.parts[own])
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", own)
        general = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", own)
        stem, _, last = general.rpartition(".")
        if general in self.parts:
            return [name.format(*numbers) for name in self.parts[general]]
        assert stem in self.parts, f"the layout does not say where {own} is kept"
        return [f"{name.format(*numbers)}.{last}" for name in self.parts[stem]]


@dataclass(frozen=True)
class Origin:
    """What a model was read from, so that it can be written back.

    Attributes:
        text: config.json, word for word.
        names: name in the checkpoint -> what of the model is kept under it.
        dtypes: name in the checkpoint -> type on disk.
        kept: what belongs to no part of the model, by name.
    """

    text: str
    names: Mapping[str, Piece]
    dtypes: Mapping[str, torch.dtype]
    kept: Mapping[str, Tensor]


class PublishedModel(folder.Kept):
    """A model that may have been read from the layout of the ``transformers`` library."""

    origin: Origin | None = None

    def to_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as they are now in the layout the model was read from, config.json word for word.

        Args:
            path: a folder; config.json and model.safetensors in it are replaced.

        Raises:
            MemtxError: the model was not read from such a folder, or this one cannot be written to.
        """
        origin = self.origin
        if origin is None:
            raise MemtxError(
                f"This {type(self).__name__} was not read from a published checkpoint.",
                "save_pretrained writes a model of our own.",
            )
        weights = self.kept_weights()
        tensors = {name: piece.taken(weights).to(origin.dtypes[name]) for name, piece in origin.names.items()}
        content.write(path, origin.text, {**origin.kept, **tensors})


def tied(found: Content, layout: Layout, head: str, embedding: str) -> bool:
    """Return whether a head's weights are the embedding's: the config allows it, and no other numbers are there."""
    if found.config.get("tie_word_embeddings") is False:
        return False
    tensors = {layout.modern(name): tensor for name, tensor in found.tensors.items()}
    return head not in tensors or (embedding in tensors and _same(tensors[head], tensors[embedding]))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def load(model: PublishedModel, found: Content, layout: Layout) -> None:
    """Fill the model with the checkpoint's tensors, all or none, in the type they are kept in.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all of them are named.
    """
    own = model.state_dict()
    by_modern = {layout.modern(name): name for name in found.tensors}
    twice = sorted(set(found.tensors) - set(by_modern.values()))
    names: dict[str, Piece] = {}
    kept: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    wrong = [f"has {name} under two names" for name in twice]
    known: set[str] = set()
    for part, tensor in own.items():
        places = layout.names(part)
        known.update(places)
        present = [by_modern[place] for place in places if place in by_modern]
        if not present:
            whole = _prefixed(found, layout) and not places[0].startswith(layout.heads)
            wrong.append(f"lacks {layout.prefix if whole else ''}{places[0]}")
            continue
        given = found.tensors[present[0]]
        if given.shape != tensor.shape:
            wrong.append(f"has {present[0]} of shape {tuple(given.shape)} instead of {tuple(tensor.shape)}")
            continue
        weights[part] = given
        for name in present:
            # The same numbers under two names are one weight; other numbers are something that the model does not use.
            if name in present[:1] or _same(found.tensors[name], given):
                names[name] = Piece.of(part)
            else:
                kept[name] = found.tensors[name]
    for modern, name in by_modern.items():
        if modern in known:
            continue
        if any(re.fullmatch(pattern, modern) for pattern in layout.kept):
            kept[name] = found.tensors[name]
        else:
            wrong.append(f"has {name}, unknown to the model")
    if wrong:
        raise CheckpointError(
            f"'{found.place}' {'; '.join(wrong)}.",
            "config.json and weights do not belong together, or one was changed.",
        )
    dtypes = [tensor.dtype for tensor in weights.values() if tensor.is_floating_point()]
    if dtypes:
        model.to(widest(dtypes))
    model.load_state_dict(weights)
    # A name may be one part's second choice and another's first.
    kept = {name: tensor for name, tensor in kept.items() if name not in names}
    model.origin = Origin(found.text, names, {name: found.tensors[name].dtype for name in names}, kept)
    model.eval()


def _prefixed(found: Content, layout: Layout) -> bool:
    return any(name.startswith(layout.prefix) for name in found.tensors)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that holds numbers of all these types."""
    widest, *others = dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    return widest
