"""The frozen teacher of a distillation, and checks that it fits the student and the data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from memtx import files
from memtx.checkpoint import pretrained
from memtx.checkpoint.load import from_pretrained
from memtx.data.tokenizers import Tokenizer, load_tokenizer
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.hf.loader import is_hf_folder
from memtx.hf.task_heads import get_labels
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer


@dataclass(frozen=True)
class Teacher:
    """Loaded teacher.

    Attributes:
        path: Path as given by the user.
        model: Model in eval mode, frozen.
        tokenizer: Its tokenizer as JSON text; None if the checkpoint has none.
        labels: Labels of the task it was trained on; empty if they are unknown.
        vocabulary: Vocabulary of the tokenizer beside a pretrained model; None if there is none.
    """

    path: str
    model: nn.Module
    tokenizer: str | None
    labels: tuple[str, ...]
    vocabulary: Any = None


def load_teacher(path: str | os.PathLike[str]) -> Teacher:
    """Load a teacher.

    Args:
        path: Run folder (its best checkpoint is used), checkpoint, or pretrained folder of memtx or ``transformers``.

    Raises:
        CheckpointError: The path is missing, damaged or not a model.
    """
    model_path = pretrained.resolve_model_path(path)
    model = from_pretrained(model_path).requires_grad_(False).eval()
    if (model_path / pretrained.CONFIG_FILE).is_file():
        return Teacher(str(path), model, None, _read_labels(model_path, model), _read_vocabulary(model_path))
    sidecars = pretrained.read_sidecars(model_path)
    labels = tuple(json.loads(sidecars["task"]).get("labels", ())) if "task" in sidecars else ()
    return Teacher(str(path), model, sidecars.get("tokenizer"), labels)


def _read_labels(folder: Path, model: nn.Module) -> tuple[str, ...]:
    """Return the labels that a published folder names; empty if it numbers them, or holds no task model."""
    if not isinstance(model, TaskModel) or not is_hf_folder(folder):
        return ()
    labels = get_labels(files.read_json(folder / pretrained.CONFIG_FILE), model.num_labels)
    return () if labels == [f"LABEL_{index}" for index in range(len(labels))] else tuple(labels)


def _read_vocabulary(folder: Path) -> Any:
    try:
        return _get_vocabulary(load_tokenizer(folder))
    except DataError:  # the folder has none, or one of another library
        return None


def _get_backend(text: str) -> Any:
    """Return what gives the ids of a text: the library's part of a tokenizer's JSON, if there is one."""
    description = json.loads(text)
    return description.get("model", description)


def _get_vocabulary(tokenizer: Tokenizer) -> Any:
    """Return what gives the ids of a text, which tokenizers of several classes share."""
    description = json.loads(tokenizer.to_json())
    return description["model"]["model"]["vocab"] if "model" in description else description["kind"]


TEACHER_TYPES: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    TaskModel: (TaskModel, Encoder),
    Encoder: (Encoder,),
    MemoryTransformer: (MemoryTransformer,),
}
"""Teachers that read the same batches, by class of the student."""


def check_teacher(teacher: Teacher, student: nn.Module, datamodule: Any) -> None:
    """Check that the teacher reads the student's batches and was trained with the tokens and labels of the run's data.

    A tokenizer or task that the data module lacks is not checked.

    Raises:
        CheckpointError: The tokenizers or the labels differ.
        MemtxError: The teacher belongs to another class, or its vocabulary is smaller than the tokenizer's.
    """
    for student_type, types in TEACHER_TYPES.items():
        if isinstance(student, student_type) and not isinstance(teacher.model, types):
            raise MemtxError(
                f"The teacher in '{teacher.path}' ({type(teacher.model).__name__}) does not fit the student "
                f"({student_type.__name__}).",
                f"Use a teacher of class {' or '.join(teacher_type.__name__ for teacher_type in types)}.",
            )
    tokenizer = getattr(datamodule, "tokenizer", None)
    if teacher.vocabulary is not None and tokenizer is not None and _get_vocabulary(tokenizer) != teacher.vocabulary:
        raise CheckpointError(
            f"The tokenizer in '{teacher.path}' is not that of the data, so token ids differ.",
            f"Set data.tokenizer to memtx.data.hf_tokenizers.HFTokenizer and its path to '{teacher.path}'.",
        )
    if (
        tokenizer is not None
        and teacher.tokenizer is not None
        and _get_backend(tokenizer.to_json()) != _get_backend(teacher.tokenizer)
    ):
        raise CheckpointError(
            f"The teacher in '{teacher.path}' was trained with another tokenizer, so its token ids differ.",
            "Use the same tokenizer for both, trained on the same texts (data.root, data.tokenizer).",
        )
    vocab_size = getattr(teacher.model, "vocab_size", None)
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise MemtxError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the teacher in '{teacher.path}' has {vocab_size}.",
            "Set data.tokenizer to the tokenizer.json that the teacher was trained with.",
        )
    labels = tuple(getattr(getattr(datamodule, "task", None), "labels", ()))
    if labels and teacher.labels and labels != teacher.labels:
        raise CheckpointError(
            f"The teacher in '{teacher.path}' has the labels {', '.join(teacher.labels[:10])}, the data "
            f"{', '.join(labels[:10])}.",
            "Set data.task.labels to the teacher's labels in their order.",
        )
