"""Episodes as batches: their content, a function of seed and position alone, and exact resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.episodes import EpisodeBatches
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.data.synthetic_tasks.copying import SelectiveCopying
from memtx.data.synthetic_tasks.data_module import SyntheticDataModule
from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
from memtx.data.synthetic_tasks.tracking import StateTracking
from memtx.errors import CheckpointError, DataError

TASKS: list[SyntheticTask] = [AssociativeRecall(), Overwrite(), SelectiveCopying(), StateTracking()]


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_batch_is_whole_episodes(task: SyntheticTask) -> None:
    segments = task.num_write_segments + 2
    batch = SyntheticDataModule(task, num_segments=segments).sample_batch(3, segments, (0, 0))
    assert (
        batch.tokens.shape == batch.labels.shape == batch.document_starts.shape == (3, segments * task.segment_length)
    )
    assert batch.document_starts[:, 0].all()
    assert not batch.document_starts[:, 1:].any()
    scored = batch.labels != IGNORE_INDEX
    # No query comes before the content ends, except in a task with content all along.
    assert not scored[:, : task.num_write_segments * task.segment_length].any()
    assert scored.any(1).all()
    assert torch.equal(batch.num_words, scored.sum(1))
    assert torch.equal(batch.num_bytes, scored.sum(1))
    assert batch.labels[scored].max() < task.vocab_size


@given(st.integers(0, 99), st.integers(0, 11), st.integers(0, 3))
def test_a_batch_depends_on_seed_and_position_alone(seed: int, position: int, rank: int) -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2)
    module = SyntheticDataModule(task, 2, 3, seed, 4)
    through = EpisodeBatches(module, rank)
    batches = [batch for _ in range(4) for batch in through]
    assert len(batches) == through.position == 4 * len(through)
    later = EpisodeBatches(module, rank)
    later.position = position
    rest = list(itertools.islice(later, 4))
    assert len(rest) == 4 - position % 4
    assert all(equal(*pair) for pair in zip(rest, batches[position:], strict=False))


def test_all_batches_differ() -> None:
    task = AssociativeRecall()
    module = SyntheticDataModule(task, batch_size=2, steps_per_epoch=3, eval_steps=2)
    batches = [*module.train_dataloader(), *module.val_dataloader(), *module.test_dataloader()]
    batches += [
        *EpisodeBatches(module, rank=1),
        *SyntheticDataModule(task, batch_size=2, steps_per_epoch=3, seed=1).val_dataloader(),
    ]
    assert not any(equal(*pair) for pair in itertools.combinations(batches, 2))
    assert all(equal(*pair) for pair in zip(module.val_dataloader(), module.val_dataloader(), strict=True))


def test_a_checkpoint_resumes_in_the_same_episodes_only() -> None:
    first = SyntheticDataModule(AssociativeRecall(), batch_size=2, steps_per_epoch=5)
    walk = iter(first.train_dataloader())
    next(walk)
    state = first.state_dict()
    assert state["position"] == 1
    second = SyntheticDataModule(AssociativeRecall(), batch_size=2, steps_per_epoch=5)
    second.load_state_dict(state)
    assert equal(next(iter(second.train_dataloader())), next(walk))
    # Also if the state is loaded after the loader was created.
    third = SyntheticDataModule(AssociativeRecall(), batch_size=2, steps_per_epoch=5)
    loader = third.train_dataloader()
    third.load_state_dict(state)
    assert loader.position == 1
    for other in (
        SyntheticDataModule(AssociativeRecall(num_pairs=3), batch_size=2),
        SyntheticDataModule(AssociativeRecall(), batch_size=3),
        SyntheticDataModule(AssociativeRecall(), batch_size=2, seed=1),
        SyntheticDataModule(AssociativeRecall(), batch_size=2, num_segments=5),
        SyntheticDataModule(SelectiveCopying(), batch_size=2, num_segments=5),
    ):
        with pytest.raises(CheckpointError):
            other.load_state_dict(state)


def test_the_module_sets_vocabulary_and_segment_length() -> None:
    module = SyntheticDataModule(Overwrite(segment_length=30, num_noise_tokens=9), num_segments=6)
    assert (module.vocab_size, module.segment_length) == (1 + 32 + 32 + 9, 30)


def test_numbers_out_of_range_are_rejected() -> None:
    for wrong in (
        {"batch_size": 0},
        {"num_segments": 1},
        {"seed": -1},
        {"steps_per_epoch": 0},
        {"eval_batch_size": 0},
        {"eval_steps": 0},
    ):
        with pytest.raises(DataError, match=next(iter(wrong))):
            SyntheticDataModule(AssociativeRecall(), **wrong)


def test_another_fit_begins_at_the_start_and_a_validation_leaves_the_position() -> None:
    module = SyntheticDataModule(AssociativeRecall(), batch_size=2, steps_per_epoch=5)
    module.setup("fit")
    first, second, third = itertools.islice(module.train_dataloader(), 3)
    module.setup("validate")
    assert module.state_dict()["position"] == 3
    assert not any(equal(next(iter(module.train_dataloader())), batch) for batch in (first, second, third))
    module.setup("fit")
    assert module.state_dict()["position"] == 0
    assert all(equal(*pair) for pair in zip(module.train_dataloader(), (first, second, third), strict=False))


def test_a_curriculum_changes_the_length_of_episodes_and_resumes() -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2)
    options: dict[str, Any] = {"batch_size": 2, "num_segments": {4: 5, 0: 2, 2: 3}, "steps_per_epoch": 6}
    module = SyntheticDataModule(task, **options)
    batches = list(module.train_dataloader())
    assert [batch.tokens.shape[1] // 8 for batch in batches] == [2, 2, 3, 3, 5, 5]
    # Validation has the last length, and a batch is the one of a run without a curriculum.
    assert next(iter(module.val_dataloader())).tokens.shape[1] == 5 * 8
    constant = SyntheticDataModule(task, batch_size=2, num_segments=3, steps_per_epoch=6)
    assert equal(list(constant.train_dataloader())[2], batches[2])
    resumed = SyntheticDataModule(task, **options)
    resumed.load_state_dict({**module.state_dict(), "position": 3})
    assert all(equal(*pair) for pair in zip(resumed.train_dataloader(), batches[3:], strict=True))
    with pytest.raises(CheckpointError, match="num_segments"):
        constant.load_state_dict(module.state_dict())


def test_shorter_episodes_are_mixed_in_equally_on_every_rank() -> None:
    task = AssociativeRecall(segment_length=8, num_pairs=2)
    options: dict[str, Any] = {"batch_size": 1, "num_segments": {0: 2, 40: 6}, "steps_per_epoch": 400}
    module = SyntheticDataModule(task, **options, shorter_episodes=0.5)
    lengths = [batch.tokens.shape[1] // 8 for batch in EpisodeBatches(module)]
    assert set(lengths[:40]) == {2}
    # Half of 360 batches have one of 5 lengths each: 36 of a length and 216 of the last are expected; 5 deviations.
    for length in range(2, 6):
        assert 36 - 29 < lengths[40:].count(length) < 36 + 29
    assert 216 - 46 < lengths.count(6) < 216 + 46
    assert [batch.tokens.shape[1] // 8 for batch in EpisodeBatches(module, rank=3)] == lengths


def test_a_curriculum_out_of_range_is_rejected() -> None:
    for curriculum, message in (
        ({1: 3}, "num_segments begins at batch 1, expected 0"),
        ({}, "num_segments begins at batch None"),
        ({0: 3, 5: 1}, "num_segments is 1, expected at least 2"),
    ):
        with pytest.raises(DataError, match=message):
            SyntheticDataModule(AssociativeRecall(), num_segments=curriculum)
    with pytest.raises(DataError, match=r"shorter_episodes is 1\.5, expected 0 to 1"):
        SyntheticDataModule(AssociativeRecall(), shorter_episodes=1.5)
