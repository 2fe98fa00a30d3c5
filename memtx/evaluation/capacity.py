"""How many pairs a memory holds, and how many for a KiB of its state (T2; Arora et al. 2024, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.errors import check_at_least
from memtx.evaluation.accuracy import StatefulModel, evaluate_accuracy

ACCURACY_THRESHOLD = 0.9
"""The accuracy at which pairs count as held."""


@dataclass(frozen=True)
class Capacity:
    """What was found.

    Attributes:
        distance: in the task's segments.
        num_pairs: the largest number that is held; 0 for none.
        is_lower_bound: whether all keys that there are were held, so that it may be more.
        accuracy_by_pairs: accuracy by number of pairs, of those tried.
        state_bytes: of the state of one stream, all layers and kinds together.
    """

    distance: int
    num_pairs: int
    is_lower_bound: bool
    accuracy_by_pairs: dict[int, float]
    state_bytes: int

    @property
    def pairs_per_kib(self) -> float:
        """Pairs for 1,024 bytes of state."""
        return self.num_pairs * 1024 / self.state_bytes


def with_num_pairs(task: AssociativeRecall, num_pairs: int) -> AssociativeRecall:
    """Return the task with so many pairs, in a segment of as many times the tokens as they need."""
    times = -(-2 * num_pairs // task.segment_length)
    return dataclasses.replace(task, num_pairs=num_pairs, segment_length=task.segment_length * times)


def evaluate_capacity(
    model: StatefulModel,
    task: AssociativeRecall,
    distance: int,
    *,
    state_bytes: int,
    threshold: float = ACCURACY_THRESHOLD,
    num_samples: int = 32,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Capacity:
    """Return the largest number of pairs that are recalled, by doubling and then by halving the interval.

    So accuracy is taken to fall with the number. A model is asked for more pairs than it was trained on.

    Args:
        model: in eval mode; see :func:`memtx.evaluation.accuracy.evaluate_accuracy`.
        task: keys, values and segment; more pairs than fit into a segment are told in a longer one.
        distance: in the task's segments, at least 1; of longer segments about as many tokens.
        state_bytes: of one stream's state.
        threshold: the accuracy at which pairs count as held.
        num_samples: episodes.
        seed: of the episodes.
        on_progress: is told the numbers of pairs as they are tried.

    Raises:
        MemtxError: distance or state_bytes is not positive.
    """
    check_at_least(1, distance=distance, state_bytes=state_bytes)
    shares: dict[int, float] = {}

    def held(pairs: int) -> bool:
        if on_progress is not None:
            on_progress(pairs)
        own = with_num_pairs(task, pairs)
        away = max(1, round(distance * task.segment_length / own.segment_length))
        shares[pairs] = evaluate_accuracy(model, own, away, num_samples=num_samples, seed=seed)
        return shares[pairs] >= threshold

    low, high = 0, task.num_keys + 1
    step = 1
    while low < step < high:
        if held(step):
            # The last one tried is all keys.
            low, step = step, min(2 * step, task.num_keys)
        else:
            high = step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) else (low, middle)
    return Capacity(distance, low, low == task.num_keys, dict(sorted(shares.items())), state_bytes)
