"""The recall task is seeded and solvable from its first segment alone, and its accuracy counts answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.errors import MemtxError
from memtx.evaluation.accuracy import evaluate_accuracy
from memtx.state import MemoryState

tasks = st.integers(1, 5).flatmap(
    lambda pairs: st.builds(
        AssociativeRecall,
        segment_length=st.integers(2 * pairs, 30),
        num_pairs=st.just(pairs),
        num_keys=st.integers(pairs, 12),
        num_values=st.integers(1, 9),
        num_noise_tokens=st.integers(1, 5),
    )
)


def sample_episode(task: AssociativeRecall, segments: int, seed: int, ask: str = "later") -> tuple[Tensor, Tensor]:
    parts = list(task.iter_segments(3, segments, torch.Generator().manual_seed(seed), query_mode=ask))
    tokens, labels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    assert tokens.shape == labels.shape == (3, segments * task.segment_length)
    return tokens, labels


@given(tasks, st.integers(2, 5), st.integers(0, 99), st.sampled_from(["later", "last"]))
def test_every_query_has_its_answer_in_the_first_segment_alone(
    task: AssociativeRecall, segments: int, seed: int, ask: str
) -> None:
    tokens, labels = sample_episode(task, segments, seed, ask)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        first = row[: task.segment_length]
        known = {first[at]: first[at + 1] for at in range(task.segment_length) if 1 <= first[at] <= task.num_keys}
        assert len(known) == task.num_pairs
        assert all(task.num_keys < value <= task.num_keys + task.num_values for value in known.values())
        queries = [at for at, answer in enumerate(answers) if answer != IGNORE_INDEX]
        query_segments = segments - 1 if ask == "later" else 1
        assert len(queries) == task.num_pairs * query_segments
        assert min(queries) >= task.segment_length * (segments - query_segments)
        assert all(row[at - 1] == 0 and answers[at] == known[row[at]] for at in queries)
        # All other tokens are noise.
        rest = [token for at, token in enumerate(row) if at >= task.segment_length and at not in queries]
        assert sum(token == 0 for token in rest) == len(queries)
        assert not any(1 <= token <= task.num_keys + task.num_values for token in rest)


@given(tasks, st.integers(0, 99))
def test_equal_seeds_give_equal_episodes(task: AssociativeRecall, seed: int) -> None:
    assert torch.equal(sample_episode(task, 3, seed)[0], sample_episode(task, 3, seed)[0])
    many = AssociativeRecall(segment_length=30, num_pairs=3, num_keys=30, num_values=30, num_noise_tokens=30)
    assert not torch.equal(sample_episode(many, 3, seed)[0], sample_episode(many, 3, seed + 1)[0])


@dataclass
class Said:
    logits: Tensor
    state: Any


class Remembering:
    """Keeps every pair for ``reach`` tokens, and otherwise says the first value."""

    def __init__(self, task: AssociativeRecall, reach: float) -> None:
        self.task, self.reach = task, reach
        self.calls: list[int] = []

    def init_state(self, batch_size: int) -> MemoryState:
        return MemoryState(torch.zeros(batch_size), (0, [{} for _ in range(batch_size)]))

    def __call__(self, tokens: Tensor, state: MemoryState) -> Said:
        read, known = state.layers
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        logits[..., 1 + self.task.num_keys] = 0.5
        for row, line in enumerate(tokens.tolist()):
            for at, token in enumerate(line):
                if not 1 <= token <= self.task.num_keys:
                    continue
                if at and line[at - 1] == 0 and token in known[row] and read + at - known[row][token][0] <= self.reach:
                    logits[row, at, known[row][token][1]] = 1.0
                elif at + 1 < len(line):
                    known[row].setdefault(token, (read + at, line[at + 1]))
        self.calls.append(tokens.shape[1])
        return Said(logits, MemoryState(torch.zeros(len(tokens)), (read + tokens.shape[1], known)))


@pytest.mark.parametrize("call", [1, 3, 100])
def test_accuracy_counts_answers(call: int) -> None:
    task = AssociativeRecall()
    for distance in (1, 5, 30):
        assert evaluate_accuracy(Remembering(task, float("inf")), task, distance, segments_per_call=call) == 1.0
    short = Remembering(task, 4 * task.segment_length)
    assert evaluate_accuracy(short, task, 2, segments_per_call=call) == 1.0
    # Four standard deviations of 128 guesses of 1 in 32.
    assert (
        evaluate_accuracy(short, task, 6, segments_per_call=call)
        < task.chance_accuracy + 4 * (task.chance_accuracy / 128) ** 0.5
    )


def test_a_long_distance_is_read_in_calls_of_bounded_length() -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2)
    reader = Remembering(task, float("inf"))
    evaluate_accuracy(reader, task, 70, segments_per_call=32)
    assert reader.calls == [256, 256, 7 * 8]


def test_impossible_tasks_are_rejected() -> None:
    for sizes in ({"num_pairs": 0}, {"num_pairs": 13}, {"num_keys": 3}, {"num_values": 0}, {"num_noise_tokens": 0}):
        with pytest.raises(MemtxError):
            AssociativeRecall(**sizes)
    generator = torch.Generator()
    for segments, ask in ((1, "later"), (3, "never")):
        with pytest.raises(MemtxError):
            next(AssociativeRecall().iter_segments(1, segments, generator, query_mode=ask))
