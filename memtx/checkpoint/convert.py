"""One kept form of a model made another: a checkpoint, of one process or many, a folder of ours, a published one."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from memtx import files
from memtx.checkpoint import pretrained
from memtx.errors import CheckpointError, MemtxError
from memtx.hf import load
from memtx.hf.layout import HFCompatibleModel


@dataclass(frozen=True)
class ConversionResult:
    """What was made.

    Attributes:
        source: the checkpoint or folder that was read.
        model_class: its class's name.
        num_parameters: how many numbers the model has.
        extra_files: names of the files beside the model's own.
        dropped_weights: names of the weights that the target's layout has no place for.
    """

    source: Path
    model_class: str
    num_parameters: int
    extra_files: list[str]
    dropped_weights: list[str]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ConversionResult:
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
    place, end = pretrained.resolve_model_path(source), Path(target)
    if end.exists() and not overwrite and not (end.is_dir() and not any(end.iterdir())):
        raise MemtxError(f"'{end}' is there already.", "Give another folder, or add --overwrite.")
    if place.resolve() == end.resolve():
        raise MemtxError(f"'{end}' is what is read.", "Give another folder.")
    model, kept = load.from_pretrained(place), pretrained.read_sidecars(place)
    texts = {pretrained.SIDECAR_FILES[name]: text for name, text in kept.items()}
    assert isinstance(model, pretrained.PretrainedModel)
    left_out: list[str] = []
    written = files.temporary_path(end)
    try:
        if layout is None:
            model.save_pretrained(written)
        else:
            published, left_out = _to_hf_layout(model, layout)
            published.export_hf(written)
        for name, text in texts.items():
            files.write_text(written / name, text)
        files.replace(written, end)
    except OSError as error:
        raise files.write_failed_error(end, error) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    return ConversionResult(place, type(model).__name__, count, sorted(texts), left_out)


def _to_hf_layout(model: nn.Module, layout: str | os.PathLike[str]) -> tuple[HFCompatibleModel, list[str]]:
    """Return the layout's model with the numbers of ``model``, and the names that it has no place for."""
    if not load.is_hf_checkpoint(layout):
        raise CheckpointError(f"'{layout}' is no published folder.", "Give the one that the training began with.")
    published = load.from_pretrained(layout)
    assert isinstance(published, HFCompatibleModel)
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
