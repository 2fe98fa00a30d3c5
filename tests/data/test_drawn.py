"""Episodes as batches: what they hold, a function of seed and position alone, and that a run goes on exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.batch import IGNORED, Batch
from memtx.data.drawn import DrawnBatches, EpisodeDataModule, draw
from memtx.data.episodes.base import Task
from memtx.data.episodes.copying import Copying
from memtx.data.episodes.overwrite import Overwrite
from memtx.data.episodes.recall import Recall
from memtx.data.episodes.tracking import Tracking
from memtx.errors import CheckpointError, DataError

TASKS: list[Task] = [Recall(), Overwrite(), Copying(), Tracking()]


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_batch_is_whole_episodes(task: Task) -> None:
    segments = task.written + 2
    batch = draw(task, 3, segments, (0, 0))
    assert batch.tokens.shape == batch.labels.shape == batch.starts.shape == (3, segments * task.segment)
    assert batch.starts[:, 0].all()
    assert not batch.starts[:, 1:].any()
    scored = batch.labels != IGNORED
    # Nothing is asked before all was told, but for a task that goes on telling.
    assert not scored[:, : task.written * task.segment].any()
    assert scored.any(1).all()
    assert torch.equal(batch.words, scored.sum(1))
    assert torch.equal(batch.bytes, scored.sum(1))
    assert batch.labels[scored].max() < task.vocab_size


@given(st.integers(0, 99), st.integers(0, 11), st.integers(0, 3))
def test_a_position_is_all_there_is_to_it(seed: int, position: int, rank: int) -> None:
    task = Recall(segment=8, pairs=2)
    through = DrawnBatches(task, 2, 3, seed, 4, rank)
    batches = [batch for _ in range(4) for batch in through]
    assert len(batches) == through.position == 4 * len(through)
    later = DrawnBatches(task, 2, 3, seed, 4, rank)
    later.position = position
    rest = list(itertools.islice(later, 4))
    assert len(rest) == 4 - position % 4
    assert all(equal(*pair) for pair in zip(rest, batches[position:], strict=False))


def test_no_two_draws_are_alike() -> None:
    task = Recall()
    module = EpisodeDataModule(task, rows=2, steps=3, eval_steps=2)
    drawn = [*module.train_dataloader(), *module.val_dataloader(), *module.test_dataloader()]
    drawn += [
        *DrawnBatches(task, 2, 4, 0, 3, rank=1),
        *EpisodeDataModule(task, rows=2, steps=3, seed=1).val_dataloader(),
    ]
    assert not any(equal(*pair) for pair in itertools.combinations(drawn, 2))
    assert all(equal(*pair) for pair in zip(module.val_dataloader(), module.val_dataloader(), strict=True))


def test_a_checkpoint_goes_on_in_the_same_episodes_only() -> None:
    first = EpisodeDataModule(Recall(), rows=2, steps=5)
    walk = iter(first.train_dataloader())
    next(walk)
    kept = first.state_dict()
    assert kept["position"] == 1
    second = EpisodeDataModule(Recall(), rows=2, steps=5)
    second.load_state_dict(kept)
    assert equal(next(iter(second.train_dataloader())), next(walk))
    # Also where it is loaded after the loader was made.
    third = EpisodeDataModule(Recall(), rows=2, steps=5)
    loader = third.train_dataloader()
    third.load_state_dict(kept)
    assert loader.position == 1
    for other in (
        EpisodeDataModule(Recall(pairs=3), rows=2),
        EpisodeDataModule(Recall(), rows=3),
        EpisodeDataModule(Recall(), rows=2, seed=1),
        EpisodeDataModule(Recall(), rows=2, segments=5),
        EpisodeDataModule(Copying(), rows=2, segments=5),
    ):
        with pytest.raises(CheckpointError):
            other.load_state_dict(kept)


def test_it_says_what_the_model_is_made_for() -> None:
    module = EpisodeDataModule(Overwrite(segment=30, noise=9), segments=6)
    assert (module.vocab_size, module.segment) == (1 + 32 + 32 + 9, 30)


def test_numbers_that_cannot_be_are_named() -> None:
    for wrong in ({"rows": 0}, {"segments": 1}, {"seed": -1}, {"steps": 0}, {"eval_rows": 0}, {"eval_steps": 0}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            EpisodeDataModule(Recall(), **wrong)
