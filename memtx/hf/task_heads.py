"""Task heads of published encoders: which task a folder was fine-tuned for, and its head as a :class:`TaskModel`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from memtx.errors import CheckpointError
from memtx.hf.checkpoint import HFCheckpoint
from memtx.hf.layout import KeyMapping
from memtx.hf.loader import load_weights
from memtx.models.heads import CLSPooling, Pooling, SequenceClassificationHead, TaskModel, TokenClassificationHead

SEQUENCE_CLASSIFICATION = "ForSequenceClassification"
TOKEN_CLASSIFICATION = "ForTokenClassification"
QUESTION_ANSWERING = "ForQuestionAnswering"
MASKED_LM = "ForMaskedLM"
TASKS = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING, MASKED_LM)
"""Ends of the class names in ``architectures``."""

HEAD_PREFIXES = ("classifier.", "pre_classifier.", "qa_", "sequence_summary.", "logits_proj.")
POOLER_PATTERN = r"pooler\.(dense\.)?(weight|bias)"
"""Names of a pooler, which heads that score every token do not use."""


@dataclass(frozen=True)
class TaskPooling:
    """Modules between the tokens and the scores of a text: names in the checkpoint, the activation, and the pooling."""

    dense: str = "pooler.dense"
    out: str = "classifier"
    activation: Callable[[], nn.Module] = nn.Tanh
    factory: Callable[..., Pooling] = CLSPooling


@dataclass(frozen=True)
class AnswerHead:
    """Head of question answering: its factory, given dim and 2, and its modules' names in the checkpoint."""

    factory: Callable[[int, int], nn.Module] = TokenClassificationHead
    keys: Mapping[str, str] = field(default_factory=lambda: {"out": "qa_outputs"})


def get_class_name(config: Mapping[str, Any]) -> str:
    """Return the name of the class that wrote config.json; empty if it has none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def get_task(config: Mapping[str, Any]) -> str | None:
    """Return the end of the class name in config.json that names a task in ``TASKS``, or None.

    Some layouts add "Simple" to the head of question answering that is the only one in others.
    """
    return next((task for task in TASKS if get_class_name(config).removesuffix("Simple").endswith(task)), None)


def get_labels(config: Mapping[str, Any], num_labels: int) -> list[str]:
    """Return the labels in order; those that config.json does not name are LABEL_0, LABEL_1 and so on."""
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping) or not all(str(index).isdigit() for index in names):
        raise CheckpointError(
            f"config.json has id2label = {names!r}, expected labels by index.", "Restore config.json."
        )
    by_index = {int(index): str(label) for index, label in names.items()}
    return [by_index.get(index, f"LABEL_{index}") for index in range(num_labels)]


def unsupported_task_error(path: str | os.PathLike[str], config: Mapping[str, Any]) -> CheckpointError:
    """Return the error of a published encoder without one of ``TASKS``."""
    message = f"'{path}' holds a {get_class_name(config) or 'model without a class name'}, whose task is not supported."
    return CheckpointError(message, f"Give a model whose class name ends with {', '.join(TASKS)}.")


def load_task_model(
    hf_checkpoint: HFCheckpoint,
    mapping: KeyMapping,
    task: str,
    backbone: Callable[[int], nn.Module],
    vocab_size: int,
    pooling: TaskPooling,
    answer_head: AnswerHead,
) -> TaskModel:
    """Build the backbone of a folder with its head; raises CheckpointError if a tensor does not fit."""
    keys = {
        f"backbone.{name}": paths for name, paths in mapping.hf_keys.items() if not name.startswith(("head", "pooler"))
    }
    extra_patterns = [*mapping.extra_patterns]
    if task == SEQUENCE_CLASSIFICATION:
        out = pooling.out
        keys |= {"head.pooling.dense": [pooling.dense], "head.out": [out]}
        pooling_factory = partial(pooling.factory, activation=pooling.activation)
        head: Callable[[int, int], nn.Module] = partial(SequenceClassificationHead, pooling=pooling_factory)
    elif task == QUESTION_ANSWERING:
        out, head = answer_head.keys["out"], answer_head.factory
        keys |= {f"head.{name}": [key] for name, key in answer_head.keys.items()}
    else:
        out, head = "classifier", TokenClassificationHead
        keys["head.out"] = [out]
    if not pooling.dense.startswith("pooler") or task != SEQUENCE_CLASSIFICATION:
        extra_patterns.append(POOLER_PATTERN)
    task_mapping = replace(mapping, hf_keys=keys, extra_patterns=extra_patterns, head_prefixes=HEAD_PREFIXES)
    if (weight := hf_checkpoint.tensors.get(f"{out}.weight")) is None:
        message = f"'{hf_checkpoint.path}' lacks {out}.weight, the head that its architectures name."
        raise CheckpointError(message, "Use the config.json that belongs to these weights.")
    factory = partial(TaskModel, vocab_size, weight.shape[0], backbone, head)
    return load_weights(factory, hf_checkpoint, task_mapping)
