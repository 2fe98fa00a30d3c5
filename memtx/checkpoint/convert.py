"""Conversion of a stored model to a pretrained folder, in memtx's format or a Hugging Face layout."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from memtx import files, hf
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import load
from memtx.data.tokenizer_files import TOKENIZER_FILES
from memtx.data.tokenizers import load_tokenizer
from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer


@dataclass(frozen=True)
class ConversionResult:
    """Summary of a conversion.

    ``source`` is the checkpoint or folder that was read, ``extra_files`` names the files beside the model's own, and
    ``dropped_weights`` the weights that the layout cannot hold.
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
    change: Callable[[pretrained.PretrainedModel], pretrained.PretrainedModel] | None = None,
    overwrite: bool = False,
) -> ConversionResult:
    """Write a stored model as a pretrained folder, completely or not at all.

    Args:
        source: Anything that :func:`memtx.checkpoint.load.load` takes.
        target: Folder to write.
        layout: Hugging Face folder whose layout and config.json are used; weights that it cannot hold, such as those of
            added memories, are dropped. Defaults to memtx's own format.
        change: Function that makes the model to write from the stored one, which is written by default.
        overwrite: If True, replace an existing target.

    Raises:
        CheckpointError: The source cannot be loaded, or its model does not have the layout.
        MemtxError: The target exists, or cannot be written.
    """
    with open_target(source, target, overwrite=overwrite) as (path, folder):
        return _write(path, folder, layout, change)


@contextlib.contextmanager
def open_target(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield the path of a stored model and a temporary folder to create, which becomes the target on success.

    Raises CheckpointError if there is no such model, and MemtxError if the target exists and ``overwrite`` is False, is
    the source, or cannot be written.
    """
    source, target = pretrained.resolve_model_path(source), Path(target)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise MemtxError(f"'{target}' already exists.", "Give another folder, or add --overwrite.")
    if source.resolve() == target.resolve():
        raise MemtxError(f"'{target}' is the source.", "Give another folder.")
    temporary = files.temporary_path(target)
    try:
        yield source, temporary
        files.replace(temporary, target)
    except OSError as error:
        raise files.write_failed_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    source: Path,
    folder: Path,
    layout: str | os.PathLike[str] | None,
    change: Callable[[pretrained.PretrainedModel], pretrained.PretrainedModel] | None,
) -> ConversionResult:
    """Write the model of a source into a folder; arguments as in :func:`convert`."""
    checkpoint = load(source)
    model = checkpoint.model if change is None else change(checkpoint.model)
    texts = {pretrained.SIDECAR_FILES[name]: text for name, text in checkpoint.sidecars.items()}
    tokenizer_path = source / pretrained.SIDECAR_FILES["tokenizer"]
    if layout is None and isinstance(checkpoint.model, MemoryTransformer) and tokenizer_path.is_file():
        # A published folder names its end tokens in other files, which memtx's format does not have.
        texts[tokenizer_path.name] = load_tokenizer(tokenizer_path).to_json()
    copied = []
    if source.is_dir() and (layout is not None or not isinstance(checkpoint.model, MemoryTransformer)):
        copied = [path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.name not in texts]
    dropped_weights: list[str] = []
    if layout is None:
        model.save_pretrained(folder)
    else:
        dropped_weights = hf.save(model, folder, layout=layout)
    for name, text in texts.items():
        files.write_text(folder / name, text)
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    extra_files = sorted([*texts, *(path.name for path in copied)])
    return ConversionResult(source, type(model).__name__, num_parameters, extra_files, dropped_weights)
