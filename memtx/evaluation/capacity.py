"""How many pairs a memory holds, and how many for a KiB of its state (T2; Arora et al. 2024, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from memtx.data.episodes.recall import Recall
from memtx.errors import at_least
from memtx.evaluation.accuracy import Model, accuracy

ENOUGH = 0.9
"""The accuracy at which pairs count as held."""


@dataclass(frozen=True)
class Capacity:
    """What was found.

    Attributes:
        distance: in the task's segments.
        pairs: the largest number that is held; 0 for none.
        limit: whether all keys that there are were held, so that it may be more.
        shares: accuracy by number of pairs, of those tried.
        state_bytes: of the state of one stream, all layers and kinds together.
    """

    distance: int
    pairs: int
    limit: bool
    shares: dict[int, float]
    state_bytes: int

    @property
    def pairs_per_kib(self) -> float:
        """Pairs for 1,024 bytes of state."""
        return self.pairs * 1024 / self.state_bytes


def with_pairs(task: Recall, pairs: int) -> Recall:
    """Return the task with so many pairs, in a segment of as many times the tokens as they need."""
    times = -(-2 * pairs // task.segment)
    return dataclasses.replace(task, pairs=pairs, segment=task.segment * times)


def capacity(
    model: Model,
    task: Recall,
    distance: int,
    *,
    state_bytes: int,
    enough: float = ENOUGH,
    rows: int = 32,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Capacity:
    """Return the largest number of pairs that are recalled, by doubling and then by halving the interval.

    So accuracy is taken to fall with the number. A model is asked for more pairs than it was trained on.

    Args:
        model: in eval mode; see :func:`memtx.evaluation.accuracy.accuracy`.
        task: keys, values and segment; more pairs than fit into a segment are told in a longer one.
        distance: in the task's segments, at least 1; of longer segments about as many tokens.
        state_bytes: of one stream's state.
        enough: the accuracy at which pairs count as held.
        rows: episodes.
        seed: of the episodes.
        watch: is told the numbers of pairs as they are tried.

    Raises:
        MemtxError: distance or state_bytes is not positive.
    """
    at_least(1, distance=distance, state_bytes=state_bytes)
    shares: dict[int, float] = {}

    def held(pairs: int) -> bool:
        if watch is not None:
            watch(pairs)
        own = with_pairs(task, pairs)
        away = max(1, round(distance * task.segment / own.segment))
        shares[pairs] = accuracy(model, own, away, rows=rows, seed=seed)
        return shares[pairs] >= enough

    low, high = 0, task.keys + 1
    step = 1
    while low < step < high:
        if held(step):
            # The last one tried is all keys.
            low, step = step, min(2 * step, task.keys)
        else:
            high = step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) else (low, middle)
    return Capacity(distance, low, low == task.keys, dict(sorted(shares.items())), state_bytes)
