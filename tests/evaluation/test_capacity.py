"""Capacity, found of a reader that holds a known number of pairs; and a task's sizes from a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.data.episodes.overwrite import Overwrite
from memtx.data.episodes.recall import Recall
from memtx.errors import MemtxError
from memtx.evaluation.capacity import capacity, with_pairs
from memtx.evaluation.checkpoint import made
from memtx.state import MemoryState
from tests.data.episodes.test_recall import Said


class Holding:
    """Keeps the first ``count`` pairs of a row, and of others says a token that is no value."""

    def __init__(self, task: Recall, count: int) -> None:
        self.task, self.count = task, count

    def __call__(self, tokens: Tensor, state: Any = None) -> Said:
        known = state.layers[0] if state is not None else [{} for _ in tokens]
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        for row, line in enumerate(tokens.tolist()):
            for at, token in enumerate(line):
                logits[row, at, known[row].get(token, 0)] = 1.0
                after = line[at + 1] if at + 1 < len(line) else 0
                is_pair = 1 <= token <= self.task.keys < after < self.task.meaning
                if is_pair and len(known[row]) < self.count:
                    known[row][token] = after
        return Said(logits, MemoryState(torch.zeros(len(tokens)), (known,)))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 9, 10])
@pytest.mark.parametrize("distance", [3, 12])
def test_capacity_is_what_is_held(count: int, distance: int) -> None:
    task = Recall(segment=8, pairs=2, keys=10, values=9)
    tried: list[int] = []
    found = capacity(Holding(task, count), task, distance, state_bytes=512, rows=3, watch=tried.append)
    # 9 of 10 answers right are enough.
    held = 10 if count == 9 else count
    assert (found.pairs, found.limit) == (held, held == 10)
    assert found.pairs_per_kib == 2 * held
    assert found.shares == {pairs: min(1.0, count / pairs) for pairs in sorted(tried)}
    assert len(tried) == len(set(tried)) <= 8


def test_more_pairs_take_a_longer_segment() -> None:
    task = Recall(segment=8, pairs=2)
    assert [with_pairs(task, pairs).segment for pairs in (1, 4, 5, 8, 9)] == [8, 8, 16, 16, 24]
    for wrong in ({"distance": 0}, {"state_bytes": 0}):
        with pytest.raises(MemtxError):
            capacity(Holding(task, 1), task, **{"distance": 3, "state_bytes": 1, **wrong})


def test_sizes_given_come_before_those_of_the_run() -> None:
    trained = {"segment": 30, "pairs": 3, "keys": 9, "elements": 7}
    assert made(Recall, trained, {"pairs": "5"}) == Recall(segment=30, pairs=5, keys=9)
    assert made(Overwrite, {}, {"first": "True", "times": "2"}) == Overwrite(first=True, times=2)
    for name, value, said in (("pears", "5", "'pairs'"), ("pairs", "five", "whole"), ("pairs", "99", "do not fit")):
        with pytest.raises(MemtxError, match=said):
            made(Recall, {}, {name: value})
    with pytest.raises(MemtxError, match="true or false"):
        made(Overwrite, {}, {"first": "1"})
