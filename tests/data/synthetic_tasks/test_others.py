"""Overwriting, copying and tracking against plain readers of their tokens; the answer is far from its query."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import QueryMode, SyntheticTask
from memtx.data.synthetic_tasks.copying import SelectiveCopying
from memtx.data.synthetic_tasks.recall import Overwrite
from memtx.data.synthetic_tasks.tracking import StateTracking
from memtx.errors import MemtxError

ROWS = 3

asks = st.sampled_from(["later", "last"])


def sample_episode(task: SyntheticTask, segments: int, seed: int, ask: QueryMode) -> tuple[Tensor, Tensor]:
    parts = list(task.iter_segments(ROWS, segments, torch.Generator().manual_seed(seed), query_mode=ask))
    tokens, labels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    assert tokens.shape == labels.shape == (ROWS, segments * task.segment_length)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    has_queries = (labels.view(ROWS, segments, -1) != IGNORE_INDEX).any(-1)
    first = task.num_write_segments if ask == "later" else segments - 1
    assert has_queries.tolist() == [[number >= first for number in range(segments)]] * ROWS
    return tokens, labels


overwriting = st.integers(1, 4).flatmap(
    lambda spread: st.builds(
        Overwrite,
        segment_length=st.integers(8, 20),
        num_pairs=st.integers(1, 4),
        num_keys=st.integers(4, 9),
        num_values=st.integers(2, 9),
        num_noise_tokens=st.integers(1, 5),
        spread=st.just(spread),
        num_overwrites=st.integers(0, spread - 1),
        query_first=st.booleans(),
    )
)


@given(overwriting, st.integers(1, 3), st.integers(0, 99), asks)
def test_queries_ask_for_overwritten_values(task: Overwrite, distance: int, seed: int, ask: QueryMode) -> None:
    tokens, labels = sample_episode(task, task.num_write_segments + distance, seed, ask)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        values_by_key: dict[int, list[int]] = {}
        for at in range(task.spread * task.segment_length):
            if 1 <= row[at] <= task.num_keys:
                assert task.num_keys < row[at + 1] <= task.num_keys + task.num_values
                values_by_key.setdefault(row[at], []).append(row[at + 1])
        assert len(values_by_key) == task.num_pairs
        # All other tokens are noise: no value without its key.
        written = row[: task.spread * task.segment_length]
        num_values = sum(task.num_keys < token < task.num_content_tokens for token in written)
        assert num_values == sum(map(len, values_by_key.values()))
        # Every overwrite changes the value, and their number is as requested.
        assert all(len(values) == 1 + task.num_overwrites for values in values_by_key.values())
        assert all(
            value != next_value for values in values_by_key.values() for value, next_value in itertools.pairwise(values)
        )
        for at, answer in enumerate(answers):
            if answer != IGNORE_INDEX:
                assert row[at - 1] == Overwrite.QUERY_TOKEN
                assert answer == values_by_key[row[at]][0 if task.query_first else -1]
        assert not any(
            token > task.num_keys and token < task.num_content_tokens
            for token in row[task.spread * task.segment_length :]
        )


copying = st.builds(
    SelectiveCopying,
    segment_length=st.integers(6, 20),
    num_copied=st.integers(1, 6),
    num_symbols=st.integers(1, 9),
    num_noise_tokens=st.integers(1, 5),
    spread=st.integers(1, 4),
)


@given(copying, st.integers(1, 3), st.integers(0, 99), asks)
def test_queries_ask_for_the_symbols_in_order(task: SelectiveCopying, distance: int, seed: int, ask: QueryMode) -> None:
    tokens, labels = sample_episode(task, task.num_write_segments + distance, seed, ask)
    border = task.spread * task.segment_length
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        symbols = [token for token in row[:border] if 1 <= token <= task.num_symbols]
        assert len(symbols) == task.num_copied
        assert not any(1 <= token <= task.num_symbols for token in row[border:])
        queries = [(row[at], answer) for at, answer in enumerate(answers) if answer != IGNORE_INDEX]
        assert queries == [(0, symbol) for symbol in symbols] * (len(queries) // task.num_copied)


tracking = st.builds(
    StateTracking,
    segment_length=st.integers(14, 20),
    num_elements=st.integers(2, 5),
    max_swaps=st.integers(1, 4),
    num_noise_tokens=st.just(3),
)


@given(tracking, st.integers(1, 4), st.integers(0, 99), asks)
def test_queries_ask_for_the_tracked_elements(task: StateTracking, distance: int, seed: int, ask: QueryMode) -> None:
    tokens, labels = sample_episode(task, task.num_write_segments + distance, seed, ask)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        state_end = 2 * task.num_elements
        assert row[0:state_end:2] == list(range(task.num_elements))
        where = [token - task.num_elements for token in row[1:state_end:2]]
        assert sorted(where) == list(range(task.num_elements))
        exchanges = 0
        for token, answer in zip(row, answers, strict=True):
            if 2 * task.num_elements <= token < task.num_content_tokens:
                first, second = task.swap_pairs[token - 2 * task.num_elements]
                where[first], where[second] = where[second], where[first]
                exchanges += 1
            if answer != IGNORE_INDEX:
                assert answer == task.num_elements + where[token]
        assert exchanges <= task.max_swaps * (task.num_write_segments + distance)


@pytest.mark.parametrize("elements", [2, 3, 5])
@pytest.mark.parametrize("distance", [1, 2])
def test_tracking_needs_the_first_segment(elements: int, distance: int) -> None:
    """After every exchange but without segment 0, each answer is as likely as any other."""
    task, batch_size = StateTracking(num_elements=elements), 4000
    parts = list(task.iter_segments(batch_size, 1 + distance, torch.Generator().manual_seed(0), query_mode="last"))
    tokens, labels = (torch.cat(part, 1)[:, task.segment_length :] for part in zip(*parts, strict=True))
    counts = torch.zeros(elements, elements)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        where = list(range(elements))
        queries = []
        for token, answer in zip(row, answers, strict=True):
            if 2 * elements <= token < task.num_content_tokens:
                first, second = task.swap_pairs[token - 2 * elements]
                where[first], where[second] = where[second], where[first]
            if answer != IGNORE_INDEX:
                queries.append((where[token], answer - elements))
        # One query per episode, since queries of an episode depend on each other.
        counts[queries[0]] += 1
    shares = counts / counts.sum(1, keepdim=True)
    # Five standard deviations of a share.
    spread = (task.chance_accuracy * (1 - task.chance_accuracy) / counts.sum(1, keepdim=True)) ** 0.5
    assert ((shares - task.chance_accuracy).abs() < 5 * spread).all()


@given(st.integers(0, 99))
def test_the_number_of_swaps_reveals_nothing(seed: int) -> None:
    """With two elements the answer is their parity, so it must be open."""
    tokens, _ = sample_episode(StateTracking(num_elements=2, max_swaps=4), 9, seed, "last")
    counts = (tokens.view(ROWS, 9, -1) == 4).sum(-1)
    # 27 fair draws of parity are all equal once in 67 million.
    assert 0 < (counts % 2).sum() < counts.numel()


@pytest.mark.parametrize("task", [Overwrite(), SelectiveCopying(), StateTracking()])
def test_guessing_is_chance(task: SyntheticTask) -> None:
    """Every answer is about as frequent as any other: the most frequent one wins little."""
    _, labels = next(
        iter(list(task.iter_segments(2000, task.num_write_segments + 1, torch.Generator().manual_seed(0)))[-1:])
    )
    scored = labels[labels != IGNORE_INDEX]
    best = scored.bincount().max() / scored.numel()
    # Five standard deviations of a share, as if the answers of an episode were fully dependent.
    per_episode = scored.numel() / 2000
    spread = (task.chance_accuracy * (1 - task.chance_accuracy) / scored.numel() * per_episode) ** 0.5
    assert best < task.chance_accuracy + 5 * spread


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Overwrite, {"num_overwrites": 4, "spread": 4}),
        (Overwrite, {"num_overwrites": -1}),
        (SelectiveCopying, {"num_copied": 25}),
        (SelectiveCopying, {"num_symbols": 0}),
        (StateTracking, {"num_elements": 1}),
        (StateTracking, {"max_swaps": 20}),
        (StateTracking, {"max_swaps": 0}),
    ],
)
def test_impossible_tasks_are_rejected(kind: Any, options: dict[str, int]) -> None:
    with pytest.raises(MemtxError):
        kind(**options)
