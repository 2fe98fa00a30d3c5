"""A model that was trained on a drawn task, and the sizes of that task, from its checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from memtx.checkpoint.load import load
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.errors import MemtxError, closest_match
from memtx.models.memory_transformer import MemoryTransformer

T = TypeVar("T", bound=SyntheticTask)


def load_model_and_task_options(path: str | os.PathLike[str]) -> tuple[MemoryTransformer, dict[str, Any]]:
    """Return the model (in eval mode, on the CPU) and the sizes of the task it was trained on; empty without one.

    Args:
        path: a training checkpoint, a run's folder, or a pretrained folder, which holds no task.

    Raises:
        CheckpointError: missing, damaged, or of something else.
    """
    checkpoint = load(path)
    return checkpoint.model_as(MemoryTransformer), _find_task_options(checkpoint.metadata)


def _find_task_options(metadata: Mapping[str, Any]) -> dict[str, Any]:
    for part in metadata.values():
        task = part.get("task") if isinstance(part, Mapping) else None
        if isinstance(task, Mapping) and isinstance(task.get("init_args"), Mapping):
            return dict(task["init_args"])
    return {}


def build_task(task_class: type[T], trained_options: Mapping[str, Any], overrides: Mapping[str, str]) -> T:
    """Return a task of the sizes given, else of those that a run had, else of its own.

    Args:
        task_class: the task's class.
        trained_options: sizes of the run's task, which may be of another kind: those that ``task_class`` does not have
            are left.
        overrides: name -> number as text, or true and false.

    Raises:
        MemtxError: there is no such size, or it cannot be.
    """
    kinds: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(task_class)}
    sizes = {name: value for name, value in trained_options.items() if name in kinds}
    for name, text in overrides.items():
        if name not in kinds:
            raise MemtxError(
                f"{task_class.__name__} has no size '{name}'.{closest_match(name, kinds)}",
                f"It has {', '.join(kinds)}.",
            )
        values = {"true": True, "false": False}
        try:
            sizes[name] = values[text.lower()] if kinds[name] is bool else int(text)
        except (KeyError, ValueError) as error:
            expected = "true or false" if kinds[name] is bool else "a whole number"
            raise MemtxError(f"{name} is '{text}', expected {expected}.") from error
    return task_class(**sizes)
