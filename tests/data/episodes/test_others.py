"""Overwriting, copying and tracking against plain readers of their tokens, and that the answer stands nowhere near."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.episodes.base import Ask, Task
from memtx.data.episodes.copying import Copying
from memtx.data.episodes.overwrite import Overwrite
from memtx.data.episodes.tracking import Tracking
from memtx.errors import MemtxError

ROWS = 3

asks = st.sampled_from(["later", "last"])


def drawn(task: Task, segments: int, seed: int, ask: Ask) -> tuple[Tensor, Tensor]:
    parts = list(task.episodes(ROWS, segments, torch.Generator().manual_seed(seed), ask=ask))
    tokens, labels = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    assert tokens.shape == labels.shape == (ROWS, segments * task.segment)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    asking = (labels.view(ROWS, segments, -1) != IGNORED).any(-1)
    first = task.written if ask == "later" else segments - 1
    assert asking.tolist() == [[number >= first for number in range(segments)]] * ROWS
    return tokens, labels


overwriting = st.integers(1, 4).flatmap(
    lambda spread: st.builds(
        Overwrite,
        segment=st.integers(8, 20),
        pairs=st.integers(1, 4),
        keys=st.integers(4, 9),
        values=st.integers(2, 9),
        noise=st.integers(1, 5),
        spread=st.just(spread),
        times=st.integers(0, spread - 1),
        first=st.booleans(),
    )
)


@given(overwriting, st.integers(1, 3), st.integers(0, 99), asks)
def test_overwritten_values(task: Overwrite, distance: int, seed: int, ask: Ask) -> None:
    tokens, labels = drawn(task, task.written + distance, seed, ask)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        told: dict[int, list[int]] = {}
        for at in range(task.spread * task.segment):
            if 1 <= row[at] <= task.keys:
                assert task.keys < row[at + 1] <= task.keys + task.values
                told.setdefault(row[at], []).append(row[at + 1])
        assert len(told) == task.pairs
        # Each change is a change, and they are as many as said.
        assert all(len(values) == 1 + task.times for values in told.values())
        assert all(one != two for values in told.values() for one, two in itertools.pairwise(values))
        for at, answer in enumerate(answers):
            if answer != IGNORED:
                assert row[at - 1] == Overwrite.ASK
                assert answer == told[row[at]][0 if task.first else -1]
        assert not any(token > task.keys and token < task.meaning for token in row[task.spread * task.segment :])


copying = st.builds(
    Copying,
    segment=st.integers(6, 20),
    count=st.integers(1, 6),
    symbols=st.integers(1, 9),
    noise=st.integers(1, 5),
    spread=st.integers(1, 4),
)


@given(copying, st.integers(1, 3), st.integers(0, 99), asks)
def test_copied_symbols(task: Copying, distance: int, seed: int, ask: Ask) -> None:
    tokens, labels = drawn(task, task.written + distance, seed, ask)
    border = task.spread * task.segment
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        kept = [token for token in row[:border] if 1 <= token <= task.symbols]
        assert len(kept) == task.count
        assert not any(1 <= token <= task.symbols for token in row[border:])
        asked = [(row[at], answer) for at, answer in enumerate(answers) if answer != IGNORED]
        assert asked == [(0, symbol) for symbol in kept] * (len(asked) // task.count)


tracking = st.builds(
    Tracking, segment=st.integers(14, 20), elements=st.integers(2, 5), exchanges=st.integers(1, 4), noise=st.just(3)
)


@given(tracking, st.integers(1, 4), st.integers(0, 99), asks)
def test_tracked_elements(task: Tracking, distance: int, seed: int, ask: Ask) -> None:
    tokens, labels = drawn(task, task.written + distance, seed, ask)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        told = 2 * task.elements
        assert row[0:told:2] == list(range(task.elements))
        where = [token - task.elements for token in row[1:told:2]]
        assert sorted(where) == list(range(task.elements))
        exchanges = 0
        for token, answer in zip(row, answers, strict=True):
            if 2 * task.elements <= token < task.meaning:
                one, two = task.swaps[token - 2 * task.elements]
                where[one], where[two] = where[two], where[one]
                exchanges += 1
            if answer != IGNORED:
                assert answer == task.elements + where[token]
        assert exchanges <= task.exchanges * (task.written + distance)


@pytest.mark.parametrize("elements", [2, 3, 5])
@pytest.mark.parametrize("distance", [1, 2])
def test_tracking_needs_the_first_segment(elements: int, distance: int) -> None:
    """Who follows every exchange but has not read segment 0 knows nothing: each answer is as likely as any other."""
    task, rows = Tracking(elements=elements), 4000
    parts = list(task.episodes(rows, 1 + distance, torch.Generator().manual_seed(0), ask="last"))
    tokens, labels = (torch.cat(part, 1)[:, task.segment :] for part in zip(*parts, strict=True))
    counts = torch.zeros(elements, elements)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        where = list(range(elements))
        asked = []
        for token, answer in zip(row, answers, strict=True):
            if 2 * elements <= token < task.meaning:
                one, two = task.swaps[token - 2 * elements]
                where[one], where[two] = where[two], where[one]
            if answer != IGNORED:
                asked.append((where[token], answer - elements))
        # One question a row, since those of a row depend on each other.
        counts[asked[0]] += 1
    shares = counts / counts.sum(1, keepdim=True)
    # Five standard deviations of a share among a row's draws.
    spread = (task.chance * (1 - task.chance) / counts.sum(1, keepdim=True)) ** 0.5
    assert ((shares - task.chance).abs() < 5 * spread).all()


@given(st.integers(0, 99))
def test_the_number_of_exchanges_tells_nothing(seed: int) -> None:
    """With two elements the answer is their parity, so it must be open."""
    tokens, _ = drawn(Tracking(elements=2, exchanges=4), 9, seed, "last")
    counts = (tokens.view(ROWS, 9, -1) == 4).sum(-1)
    # 27 fair draws of parity are all alike once in 67 million.
    assert 0 < (counts % 2).sum() < counts.numel()


@pytest.mark.parametrize("task", [Overwrite(), Copying(), Tracking()])
def test_guessing_is_chance(task: Task) -> None:
    """Every answer is about as frequent as any other: the most frequent one wins little."""
    _, labels = next(iter(list(task.episodes(2000, task.written + 1, torch.Generator().manual_seed(0)))[-1:]))
    scored = labels[labels != IGNORED]
    best = scored.bincount().max() / scored.numel()
    # Five standard deviations of a share, answers of an episode being anything but independent at worst.
    per_episode = scored.numel() / 2000
    spread = (task.chance * (1 - task.chance) / scored.numel() * per_episode) ** 0.5
    assert best < task.chance + 5 * spread


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Overwrite, {"times": 4, "spread": 4}),
        (Overwrite, {"times": -1}),
        (Copying, {"count": 25}),
        (Copying, {"symbols": 0}),
        (Tracking, {"elements": 1}),
        (Tracking, {"exchanges": 20}),
    ],
)
def test_tasks_that_cannot_be_are_named(kind: Any, options: dict[str, int]) -> None:
    with pytest.raises(MemtxError):
        kind(**options)
