"""Capacity measured on a fake model that holds a known number of pairs, and task options from a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
from memtx.errors import MemtxError
from memtx.evaluation.accuracy import build_task, evaluate_capacity, with_num_pairs
from memtx.state import MemoryState
from tests.data.synthetic_tasks.test_recall import Said


class HoldsPairs:
    """Keeps the first ``count`` pairs of each stream; for other keys it predicts a token that is not a value."""

    def __init__(self, task: AssociativeRecall, count: int) -> None:
        self.task, self.count = task, count

    def init_state(self, batch_size: int) -> MemoryState:
        return MemoryState(torch.zeros(batch_size), ([{} for _ in range(batch_size)],))

    def __call__(self, tokens: Tensor, state: MemoryState) -> Said:
        known = state.layers[0]
        logits = torch.zeros(*tokens.shape, self.task.vocab_size)
        for stream, stream_tokens in enumerate(tokens.tolist()):
            for index, token in enumerate(stream_tokens):
                logits[stream, index, known[stream].get(token, 0)] = 1.0
                next_token = stream_tokens[index + 1] if index + 1 < len(stream_tokens) else 0
                is_pair = 1 <= token <= self.task.num_keys < next_token < self.task.num_content_tokens
                if is_pair and len(known[stream]) < self.count:
                    known[stream][token] = next_token
        return Said(logits, MemoryState(torch.zeros(len(tokens)), (known,)))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 9, 10])
@pytest.mark.parametrize("distance", [3, 12])
def test_capacity_is_the_number_of_pairs_held(count: int, distance: int) -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2, num_keys=10, num_values=9)
    tried: list[int] = []
    capacity = evaluate_capacity(
        HoldsPairs(task, count), task, distance, state_bytes=512, num_samples=3, on_progress=tried.append
    )
    # 9 correct answers out of 10 reach the threshold.
    expected = 10 if count == 9 else count
    assert (capacity.num_pairs, capacity.is_lower_bound) == (expected, expected == 10)
    assert capacity.pairs_per_kib == 2 * expected
    assert capacity.accuracy_by_pairs == {pairs: min(1.0, count / pairs) for pairs in sorted(tried)}
    assert len(tried) == len(set(tried)) <= 8


def test_more_pairs_take_a_longer_segment() -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2)
    assert [with_num_pairs(task, pairs).segment_length for pairs in (1, 4, 5, 8, 9)] == [8, 8, 16, 16, 24]
    for invalid in ({"distance": 0}, {"state_bytes": 0}):
        with pytest.raises(MemtxError):
            evaluate_capacity(HoldsPairs(task, 1), task, **{"distance": 3, "state_bytes": 1, **invalid})


def test_explicit_task_options_override_those_of_the_run() -> None:
    trained = {"segment_length": 30, "num_pairs": 3, "num_keys": 9, "num_elements": 7}
    assert build_task(AssociativeRecall, trained, {"num_pairs": "5"}) == AssociativeRecall(
        segment_length=30, num_pairs=5, num_keys=9
    )
    assert build_task(Overwrite, {}, {"query_first": "True", "num_overwrites": "2"}) == Overwrite(
        query_first=True, num_overwrites=2
    )
    for name, value, message in (
        ("num_pears", "5", "'num_pairs'"),
        ("num_pairs", "five", "an integer"),
        ("num_pairs", "99", "do not fit"),
    ):
        with pytest.raises(MemtxError, match=message):
            build_task(AssociativeRecall, {}, {name: value})
    with pytest.raises(MemtxError, match="true or false"):
        build_task(Overwrite, {}, {"query_first": "1"})
