"""The teacher as it was kept: its model, frozen, and what it was trained to read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtx.checkpoint import pretrained
from memtx.checkpoint.load import from_pretrained
from memtx.errors import CheckpointError, MemtxError
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.cpu_info import is_bf16_slow


@dataclass(frozen=True)
class Teacher:
    """A teacher.

    Attributes:
        path: as the user gave it.
        model: in eval mode, of parameters that do not learn.
        tokenizer: as JSON text; None where it was kept without one.
        labels: of the task it was trained on; empty without one.
    """

    path: str
    model: nn.Module
    tokenizer: str | None
    labels: tuple[str, ...]


def load_teacher(path: str | os.PathLike[str], *, bf16: bool = False) -> Teacher:
    """Open a teacher.

    Args:
        path: a run's folder (of which the best checkpoint is taken), a checkpoint, or a folder of ours or in the layout
            of the ``transformers`` library.
        bf16: whether to hold and run it in bfloat16, unless this machine is slow in it.

    Raises:
        CheckpointError: missing, damaged or of something else.
    """
    place = pretrained.resolve_model_path(path)
    model = from_pretrained(place).requires_grad_(False).eval()
    if bf16 and not is_bf16_slow():
        model.to(torch.bfloat16)
    texts = pretrained.read_sidecars(place) if place.is_file() else {}
    labels = tuple(json.loads(texts["task"]).get("labels", ())) if "task" in texts else ()
    return Teacher(str(path), model, texts.get("tokenizer"), labels)


TEACHER_TYPES: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    TaskModel: (TaskModel, Encoder),
    Encoder: (Encoder,),
    MemoryTransformer: (MemoryTransformer,),
}
"""Whom models of a kind can learn from: who reads the same batches."""


def check_teacher_type(teacher: Teacher, student: nn.Module) -> None:
    """Raise unless the teacher reads what the student reads.

    Raises:
        MemtxError: it is of another kind.
    """
    for kind, teachers in TEACHER_TYPES.items():
        if isinstance(student, kind) and not isinstance(teacher.model, teachers):
            known = " or ".join(f"a {one.__name__}" for one in teachers)
            raise MemtxError(
                f"The teacher in '{teacher.path}' is a {type(teacher.model).__name__}, the student a {kind.__name__}.",
                f"It learns from {known}.",
            )


def check_teacher_data(teacher: Teacher, datamodule: Any) -> None:
    """Raise unless the teacher reads tokens, and names labels, as the run's data do.

    Args:
        teacher: the teacher.
        datamodule: the run's data module; what it does not have is not looked at.

    Raises:
        CheckpointError: the tokenizers or the labels differ.
        MemtxError: the tokenizer has tokens that the teacher does not know.
    """
    tokenizer = getattr(datamodule, "tokenizer", None)
    if tokenizer is not None and teacher.tokenizer is not None and tokenizer.to_json() != teacher.tokenizer:
        raise CheckpointError(
            f"The teacher in '{teacher.path}' was trained with another tokenizer: its token ids mean something else.",
            "Give both the same tokenizer, trained on the same texts (data.root, data.tokenizer).",
        )
    known = getattr(teacher.model, "vocab_size", None)
    if tokenizer is not None and known is not None and tokenizer.vocab_size > known:
        raise MemtxError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the teacher in '{teacher.path}' knows {known}.",
            "Give data.tokenizer the tokenizer.json that the teacher was trained with.",
        )
    labels = tuple(getattr(getattr(datamodule, "task", None), "labels", ()))
    if labels and teacher.labels and labels != teacher.labels:
        raise CheckpointError(
            f"The teacher in '{teacher.path}' names the labels {', '.join(teacher.labels[:10])}, the data "
            f"{', '.join(labels[:10])}.",
            "Give the teacher's labels in its order: data.task.labels.",
        )
