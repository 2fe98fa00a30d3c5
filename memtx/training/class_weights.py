"""Weights of classes in a training loss, from numbers of the user or from the training examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtx.errors import MemtxError, closest_match

BALANCED = "balanced"


def compute_class_weights(
    choice: str | Sequence[float] | Mapping[str, float], data: Any, balance: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Return a weight for each label, ``(num_labels,)`` float32.

    Args:
        choice: ``balanced``, weights in the order of the labels, or weights by label, where the others have 1.
        data: Data module with a task and ``count_labels``.
        balance: Computes balanced weights from the number of training examples with each label, ``(num_labels,)``, and
            the number of all training examples.

    Raises:
        MemtxError: A weight is not positive, the number of weights is another, or a label does not exist.
    """
    labels = tuple(data.task.labels)
    if choice == BALANCED:
        counts, num_examples = data.count_labels()
        return balance(torch.tensor(counts, dtype=torch.float32), num_examples)
    if isinstance(choice, str):
        raise MemtxError(f"class_weights is '{choice}', expected {BALANCED} or numbers.", "Change it.")
    if isinstance(choice, Mapping):
        for name in choice:
            if name not in labels:
                message = f"class_weights has '{name}', which is no label.{closest_match(name, labels)}"
                raise MemtxError(message, f"The labels are {', '.join(labels[:20])}.")
        choice = [choice.get(label, 1.0) for label in labels]
    if len(choice) != len(labels):
        message = f"class_weights has {len(choice)} weights, there are {len(labels)} labels."
        raise MemtxError(message, f"Give one for each of {', '.join(labels[:20])}.")
    for label, weight in zip(labels, choice, strict=True):
        if not 0 < weight < math.inf:
            raise MemtxError(f"class_weights has {weight} for '{label}', expected a positive number.", "Change it.")
    return torch.tensor(choice, dtype=torch.float32)
