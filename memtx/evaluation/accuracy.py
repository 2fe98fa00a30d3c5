"""How often a model answers exactly, by how far back the answer lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.episodes.base import Task
from memtx.state import MemoryState


class Model(Protocol):
    """What reads a stream with a state, such as :class:`memtx.MemoryTransformer`."""

    def __call__(self, tokens: Tensor, state: MemoryState | None = None) -> Any:
        """Read (rows, segment); ``logits`` and ``state`` of what it returns are used."""
        ...


@torch.no_grad()
def accuracy(
    model: Model,
    task: Task,
    distance: int,
    *,
    rows: int = 32,
    seed: int = 0,
    call: int = 32,
    watch: Callable[[int], None] | None = None,
) -> float:
    """Return the share of questions answered exactly, ``distance`` segments after the last one that is asked about.

    Args:
        model: in eval mode, on the CPU or wherever its state puts it; how a stream is cut must not matter to it,
            or ``call`` must be 1.
        task: the task.
        distance: segments from what is asked about to the questions, at least 1.
        rows: episodes.
        seed: of the episodes.
        call: segments a call.
        watch: is told after every call how many segments it read.
    """
    generator = torch.Generator().manual_seed(seed)
    state: MemoryState | None = None
    waiting: list[Tensor] = []
    right = asked = 0
    last = task.written + distance - 1
    for number, (tokens, labels) in enumerate(task.episodes(rows, last + 1, generator, ask="last")):
        waiting.append(tokens)
        if len(waiting) < call and number < last:
            continue
        device = state.position.device if state is not None else None
        found = model(torch.cat(waiting, dim=1).to(device), state)
        if watch is not None:
            watch(len(waiting))
        state, waiting = found.state, []
        if number == last:
            scored = labels != IGNORED
            told = found.logits[:, -task.segment :].argmax(-1).cpu()
            right, asked = int((told == labels)[scored].sum()), int(scored.sum())
    return right / asked
