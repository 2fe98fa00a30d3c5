"""A model that was trained on a drawn task, and the sizes of that task, from its checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from memtx.data.episodes.base import Task
from memtx.errors import MemtxError, nearest
from memtx.models import folder
from memtx.models.memory_transformer import MemoryTransformer

T = TypeVar("T", bound=Task)


def load(path: str | os.PathLike[str]) -> tuple[MemoryTransformer, dict[str, Any]]:
    """Return the model (in eval mode, on the CPU) and the sizes of the task it was trained on; empty without one.

    Args:
        path: a training checkpoint, a run's folder, or a pretrained folder, which holds no task.

    Raises:
        CheckpointError: missing, damaged, or of something else.
    """
    place = folder.chosen_place(path)
    model = MemoryTransformer.from_pretrained(place)
    sizes = {} if (place / folder.CONFIG).is_file() else _sizes(place)
    return model.eval(), sizes


def _sizes(place: Path) -> dict[str, Any]:
    content = folder.read_notes(place)
    for part in content.values():
        task = part.get("task") if isinstance(part, Mapping) else None
        if isinstance(task, Mapping) and isinstance(task.get("init_args"), Mapping):
            return dict(task["init_args"])
    return {}


def made(kind: type[T], trained: Mapping[str, Any], given: Mapping[str, str]) -> T:
    """Return a task of the sizes given, else of those that a run had, else of its own.

    Args:
        kind: the task's class.
        trained: sizes of the run's task, which may be of another kind: those that ``kind`` does not have are left.
        given: name -> number as text, or true and false.

    Raises:
        MemtxError: there is no such size, or it cannot be.
    """
    kinds: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    sizes = {name: value for name, value in trained.items() if name in kinds}
    for name, text in given.items():
        if name not in kinds:
            raise MemtxError(
                f"{kind.__name__} has no size '{name}'.{nearest(name, kinds)}", f"It has {', '.join(kinds)}."
            )
        values = {"true": True, "false": False}
        try:
            sizes[name] = values[text.lower()] if kinds[name] is bool else int(text)
        except (KeyError, ValueError) as error:
            expected = "true or false" if kinds[name] is bool else "a whole number"
            raise MemtxError(f"{name} is '{text}', expected {expected}.") from error
    return kind(**sizes)
