"""The recall task is honest, seeded and solvable, and its measure counts what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.episodes.recall import Recall
from memtx.errors import MemtxError
from memtx.evaluation.accuracy import accuracy
from memtx.state import MemoryState

tasks = st.integers(1, 5).flatmap(
    lambda pairs: st.builds(
        Recall,
        segment=st.integers(2 * pairs, 30),
        pairs=st.just(pairs),
        keys=st.integers(pairs, 12),
        values=st.integers(1, 9),
        noise=st.integers(1, 5),
    )
)


def drawn(task: Recall, segments: int, seed: int, ask: str = "later") -> tuple[Tensor, Tensor]:
    parts = list(task.episodes(3, segments, torch.Generator().manual_seed(seed), ask=ask))
    tokens, labels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    assert tokens.shape == labels.shape == (3, segments * task.segment)
    return tokens, labels


@given(tasks, st.integers(2, 5), st.integers(0, 99), st.sampled_from(["later", "last"]))
def test_every_question_has_its_answer_in_the_first_segment_alone(
    task: Recall, segments: int, seed: int, ask: str
) -> None:
    tokens, labels = drawn(task, segments, seed, ask)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        first = row[: task.segment]
        known = {first[at]: first[at + 1] for at in range(task.segment) if 1 <= first[at] <= task.keys}
        assert len(known) == task.pairs
        assert all(task.keys < value <= task.keys + task.values for value in known.values())
        asked = [at for at, answer in enumerate(answers) if answer != IGNORED]
        asking = segments - 1 if ask == "later" else 1
        assert len(asked) == task.pairs * asking
        assert min(asked) >= task.segment * (segments - asking)
        assert all(row[at - 1] == 0 and answers[at] == known[row[at]] for at in asked)
        # Nothing else is a question, a key or a value.
        rest = [token for at, token in enumerate(row) if at >= task.segment and at not in asked]
        assert sum(token == 0 for token in rest) == len(asked)
        assert not any(1 <= token <= task.keys + task.values for token in rest)


@given(tasks, st.integers(0, 99))
def test_equal_seeds_give_equal_episodes(task: Recall, seed: int) -> None:
    assert torch.equal(drawn(task, 3, seed)[0], drawn(task, 3, seed)[0])
    many = Recall(segment=30, pairs=3, keys=30, values=30, noise=30)
    assert not torch.equal(drawn(many, 3, seed)[0], drawn(many, 3, seed + 1)[0])


@dataclass
class Said:
    logits: Tensor
    state: Any


class Remembering:
    """Keeps every pair for ``reach`` tokens, and otherwise says the first value."""

    def __init__(self, task: Recall, reach: float) -> None:
        self.task, self.reach = task, reach
        self.calls: list[int] = []

    def __call__(self, tokens: Tensor, state: Any = None) -> Said:
        read, known = state.layers if state is not None else (0, [{} for _ in tokens])
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        logits[..., 1 + self.task.keys] = 0.5
        for row, line in enumerate(tokens.tolist()):
            for at, token in enumerate(line):
                if not 1 <= token <= self.task.keys:
                    continue
                if at and line[at - 1] == 0 and token in known[row] and read + at - known[row][token][0] <= self.reach:
                    logits[row, at, known[row][token][1]] = 1.0
                elif at + 1 < len(line):
                    known[row].setdefault(token, (read + at, line[at + 1]))
        self.calls.append(tokens.shape[1])
        return Said(logits, MemoryState(torch.zeros(len(tokens)), (read + tokens.shape[1], known)))


@pytest.mark.parametrize("call", [1, 3, 100])
def test_accuracy_counts_answers(call: int) -> None:
    task = Recall()
    for distance in (1, 5, 30):
        assert accuracy(Remembering(task, float("inf")), task, distance, call=call) == 1.0
    short = Remembering(task, 4 * task.segment)
    assert accuracy(short, task, 2, call=call) == 1.0
    # Four standard deviations of 128 guesses of 1 in 32.
    assert accuracy(short, task, 6, call=call) < task.chance + 4 * (task.chance / 128) ** 0.5


def test_a_long_distance_is_read_in_calls_of_bounded_length() -> None:
    task = Recall(segment=8, pairs=2)
    reader = Remembering(task, float("inf"))
    accuracy(reader, task, 70, call=32)
    assert reader.calls == [256, 256, 7 * 8]


def test_tasks_that_cannot_be_are_named() -> None:
    for sizes in ({"pairs": 0}, {"pairs": 13}, {"keys": 3}, {"values": 0}, {"noise": 0}):
        with pytest.raises(MemtxError):
            Recall(**sizes)
    generator = torch.Generator()
    for segments, ask in ((1, "later"), (3, "never")):
        with pytest.raises(MemtxError):
            next(Recall().episodes(1, segments, generator, ask=ask))
