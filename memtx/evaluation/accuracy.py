"""Accuracy on synthetic tasks by distance, and capacity: the number of pairs that a memory holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from memtx.checkpoint.load import load
from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.errors import MemtxError, check_at_least, closest_match
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import RecurrentLanguageModel

T = TypeVar("T", bound=SyntheticTask)

ProgressFn = Callable[[int], None]
"""Receives the work done since its last call, as a count."""

ACCURACY_THRESHOLD = 0.9
"""Minimum accuracy at which a number of pairs counts as held."""


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy under one condition, such as a task or a depth, at a distance in tokens.

    Attributes:
        accuracy: Fraction of correct answers; None if there were no questions.
        chance: Accuracy of guessing, or of always giving the most frequent answer if answers are unbalanced.
    """

    name: str
    distance: int
    accuracy: float | None
    chance: float


def average_by_distance(name: str, results: list[EvaluationResult]) -> list[EvaluationResult]:
    """Return the mean over conditions at each distance, excluding conditions without accuracy."""
    averages = []
    for distance in dict.fromkeys(result.distance for result in results):
        group = [result for result in results if result.distance == distance]
        accuracies = [result.accuracy for result in group if result.accuracy is not None]
        chances = [result.chance for result in group if result.accuracy is not None or not accuracies]
        mean = sum(accuracies) / len(accuracies) if accuracies else None
        averages.append(EvaluationResult(name, distance, mean, sum(chances) / len(chances)))
    return averages


@torch.no_grad()
def evaluate_accuracy(
    model: RecurrentLanguageModel,
    task: SyntheticTask,
    distance: int,
    *,
    num_samples: int = 32,
    seed: int = 0,
    segments_per_call: int = 32,
    on_progress: ProgressFn = lambda _: None,
) -> float:
    """Return the fraction of questions answered correctly in ``num_samples`` episodes, with the model in eval mode.

    ``distance`` is the number of segments from the last written segment to the questions, at least 1. If the model's
    output depends on the segmentation, ``segments_per_call`` must be 1. ``on_progress`` is called after every call of
    the model with the number of segments it read.
    """
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(num_samples)
    pending: list[Tensor] = []
    num_segments = task.num_write_segments + distance
    segments = task.iter_segments(num_samples, num_segments, generator, query_mode="last")
    for number, segment in enumerate(segments, 1):
        tokens, labels = segment
        pending.append(tokens)
        if len(pending) < segments_per_call and number < num_segments:
            continue
        output = model(torch.cat(pending, dim=1).to(state.position.device), state)
        on_progress(len(pending))
        state, pending = output.state, []
    # Only the last segment has questions.
    assert output.logits is not None
    is_question = labels != IGNORE_INDEX
    predictions = output.logits[:, -task.segment_length :].argmax(-1).cpu()
    return int((predictions == labels)[is_question].sum()) / int(is_question.sum())


@dataclass(frozen=True)
class Capacity:
    """Capacity of a memory for key-value pairs (Arora et al. 2024, section 3).

    Attributes:
        distance: Distance in segments of the task.
        num_pairs: Largest number of pairs held, or 0.
        is_lower_bound: If True, pairs for all keys were held, so the capacity may be larger.
        accuracy_by_pairs: Accuracy for each number of pairs tried.
        state_bytes: Size of the state of one stream.
    """

    distance: int
    num_pairs: int
    is_lower_bound: bool
    accuracy_by_pairs: dict[int, float]
    state_bytes: int

    @property
    def pairs_per_kib(self) -> float:
        """Pairs per 1,024 bytes of state."""
        return self.num_pairs * 1024 / self.state_bytes


def with_num_pairs(task: AssociativeRecall, num_pairs: int) -> AssociativeRecall:
    """Return the task with another number of pairs, and a multiple of its segment length that fits them."""
    factor = -(-2 * num_pairs // task.segment_length)
    return dataclasses.replace(task, num_pairs=num_pairs, segment_length=task.segment_length * factor)


def evaluate_capacity(
    model: RecurrentLanguageModel,
    task: AssociativeRecall,
    distance: int,
    *,
    state_bytes: int,
    threshold: float = ACCURACY_THRESHOLD,
    num_samples: int = 32,
    seed: int = 0,
    on_progress: ProgressFn = lambda _: None,
) -> Capacity:
    """Return the largest number of pairs recalled, found by doubling and then by bisection.

    Assumes that accuracy falls with the number of pairs, which may exceed the number in training.

    Args:
        model: Model in eval mode; see :func:`evaluate_accuracy`.
        task: Task with keys, values and segment length; pairs that do not fit into a segment get a longer one.
        distance: Distance in segments of the task, at least 1; longer segments keep about the same number of tokens.
        state_bytes: Size of the state of one stream, at least 1.
        threshold: Minimum accuracy at which a number of pairs counts as held.
        num_samples: Number of episodes.
        seed: Seed of the episodes.
        on_progress: Called with each number of pairs before it is tried.

    Raises:
        MemtxError: ``distance`` or ``state_bytes`` is not positive.
    """
    check_at_least(1, distance=distance, state_bytes=state_bytes)
    accuracies: dict[int, float] = {}

    def holds(num_pairs: int) -> bool:
        on_progress(num_pairs)
        longer_task = with_num_pairs(task, num_pairs)
        num_segments = max(1, round(distance * task.segment_length / longer_task.segment_length))
        accuracies[num_pairs] = evaluate_accuracy(model, longer_task, num_segments, num_samples=num_samples, seed=seed)
        return accuracies[num_pairs] >= threshold

    low, high, step = 0, task.num_keys + 1, 1
    while low < step < high:
        if holds(step):
            low, step = step, min(2 * step, task.num_keys)
        else:
            high = step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return Capacity(distance, low, low == task.num_keys, dict(sorted(accuracies.items())), state_bytes)


def load_model_and_task_options(path: str | os.PathLike[str]) -> tuple[MemoryTransformer, dict[str, Any]]:
    """Load a model (in eval mode, on the CPU) and the options of its run's synthetic task, if any.

    Raises CheckpointError if the checkpoint is missing, damaged, or not from memtx.
    """
    checkpoint = load(path)
    entries = [entry.get("task") for entry in checkpoint.metadata.values() if isinstance(entry, Mapping)]
    options = (task.get("init_args") for task in entries if isinstance(task, Mapping))
    trained_options = next((dict(entry) for entry in options if isinstance(entry, Mapping)), {})
    return checkpoint.model_as(MemoryTransformer), trained_options


def build_task(task_class: type[T], trained_options: Mapping[str, Any], overrides: Mapping[str, str]) -> T:
    """Build a task from ``overrides``, then the options of a run, then the defaults of its class.

    Options of the run that ``task_class`` does not have are ignored. Values of ``overrides`` are text: an integer, true
    or false. Raises MemtxError if an option of ``overrides`` is unknown, or its value is invalid.
    """
    types: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(task_class)}
    options = {name: value for name, value in trained_options.items() if name in types}
    for name, text in overrides.items():
        if name not in types:
            message = f"{task_class.__name__} has no option '{name}'.{closest_match(name, types)}"
            raise MemtxError(message, f"Its options are {', '.join(types)}.")
        try:
            options[name] = {"true": True, "false": False}[text.lower()] if types[name] is bool else int(text)
        except (KeyError, ValueError) as error:
            expected = "true or false" if types[name] is bool else "an integer"
            raise MemtxError(f"{name} is '{text}', expected {expected}.") from error
    return task_class(**options)
