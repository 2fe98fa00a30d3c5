"""How often a model answers exactly, by how far back the answer lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.state import MemoryState


class StatefulModel(Protocol):
    """What reads a stream with a state, such as :class:`memtx.MemoryTransformer`."""

    def __call__(self, tokens: Tensor, state: MemoryState | None = None) -> Any:
        """Read (batch, length); ``logits`` and ``state`` of what it returns are used."""
        ...


@torch.no_grad()
def evaluate_accuracy(
    model: StatefulModel,
    task: SyntheticTask,
    distance: int,
    *,
    num_samples: int = 32,
    seed: int = 0,
    segments_per_call: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """Return the share of questions answered exactly, ``distance`` segments after the last one that is asked about.

    Args:
        model: in eval mode, on the CPU or wherever its state puts it; how a stream is cut must not matter to it,
            or ``segments_per_call`` must be 1.
        task: the task.
        distance: segments from what is asked about to the questions, at least 1.
        num_samples: episodes.
        seed: of the episodes.
        segments_per_call: segments a call.
        on_progress: is told after every call how many segments it read.
    """
    generator = torch.Generator().manual_seed(seed)
    state: MemoryState | None = None
    waiting: list[Tensor] = []
    right = asked = 0
    last = task.num_write_segments + distance - 1
    for number, (tokens, labels) in enumerate(task.iter_segments(num_samples, last + 1, generator, query_mode="last")):
        waiting.append(tokens)
        if len(waiting) < segments_per_call and number < last:
            continue
        device = state.position.device if state is not None else None
        found = model(torch.cat(waiting, dim=1).to(device), state)
        if on_progress is not None:
            on_progress(len(waiting))
        state, waiting = found.state, []
        if number == last:
            scored = labels != IGNORE_INDEX
            told = found.logits[:, -task.segment_length :].argmax(-1).cpu()
            right, asked = int((told == labels)[scored].sum()), int(scored.sum())
    return right / asked
