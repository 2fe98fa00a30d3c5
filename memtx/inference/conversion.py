"""One kept form of a model made another: a checkpoint, of one process or many, a folder of ours, a published one."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from memtx import files
from memtx.errors import CheckpointError, MemtxError
from memtx.models import folder
from memtx.models.published import load
from memtx.models.published.layout import PublishedModel


@dataclass(frozen=True)
class Converted:
    """What was made.

    Attributes:
        source: the checkpoint or folder that was read.
        model: its class's name.
        parameters: how many numbers the model has.
        texts: names of the files beside the model's own.
        left_out: names of the weights that the target's layout has no place for.
    """

    source: Path
    model: str
    parameters: int
    texts: list[str]
    left_out: list[str]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write what is kept at ``source`` as a pretrained folder, whole or not at all.

    Args:
        source: a training checkpoint (a file, or a folder of several processes), a run's folder (its best), a folder
            of ours, or a published one.
        target: the folder to be made.
        layout: a published folder: the model is written as that one is, with that config.json; weights that it does
            not have, such as those of memories that were added, are left out. None for our own format.
        overwrite: whether a folder or file that is there is replaced.

    Raises:
        CheckpointError: the source cannot be read, or its model is not the layout's.
        MemtxError: something is at ``target``, or it cannot be written.
    """
    place, end = folder.chosen_place(source), Path(target)
    if end.exists() and not overwrite and not (end.is_dir() and not any(end.iterdir())):
        raise MemtxError(f"'{end}' is there already.", "Give another folder, or add --overwrite.")
    if place.resolve() == end.resolve():
        raise MemtxError(f"'{end}' is what is read.", "Give another folder.")
    model, kept = load.from_pretrained(place), folder.kept_texts(place)
    texts = {folder.TEXTS[name]: text for name, text in kept.items()}
    assert isinstance(model, folder.Kept)
    left_out: list[str] = []
    written = files.temporary_name(end)
    try:
        if layout is None:
            model.save_pretrained(written)
        else:
            published, left_out = _fitted(model, layout)
            published.to_pretrained(written)
        for name, text in texts.items():
            files.write_text(written / name, text)
        files.replace(written, end)
    except OSError as error:
        raise files.not_written(end, error) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Converted(place, type(model).__name__, count, sorted(texts), left_out)


def _fitted(model: nn.Module, layout: str | os.PathLike[str]) -> tuple[PublishedModel, list[str]]:
    """Return the layout's model with the numbers of ``model``, and the names that it has no place for."""
    if not load.is_published(layout):
        raise CheckpointError(f"'{layout}' is no published folder.", "Give the one that the training began with.")
    published = load.from_pretrained(layout)
    assert isinstance(published, PublishedModel)
    own, weights = published.state_dict(), model.state_dict()
    wrong = [
        f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'} instead of {tuple(own[name].shape)}"
        for name in own
        if name not in weights or weights[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"The model does not have the layout of '{layout}': {'; '.join(wrong[:3])}.",
            "Give the folder that the training began with.",
        )
    published.load_state_dict({name: weights[name] for name in own})
    return published, sorted(weights.keys() - own.keys())
