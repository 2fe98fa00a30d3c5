"""Stories in books as episodes: their form, splits, and a function of seed and position alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.data.babilong import BabilongDataModule
from memtx.data.batch import IGNORE_INDEX
from memtx.data.tokenizers import BytePairTokenizer
from memtx.errors import CheckpointError, DataError

BOOK = "".join(f"Night {number} was dark and stormy on the moor. " for number in range(300))
STORY = "1 Ann moved to the {0}.\n2 Bob went to the {1}.\n3 Where is Ann?\t{0}\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, locations in (("train", ("garden", "office")), ("test", ("cellar", "attic"))):
        stories = [STORY.format(*pair) for pair in itertools.permutations(locations)] * 10
        (tmp_path / f"qa1_where_{split}.txt").write_text("".join(stories))
        (tmp_path / "books" / split).mkdir(parents=True)
        (tmp_path / "books" / split / "1.txt").write_text(BOOK.replace("moor", f"moor of {split}"))
    return tmp_path


def module_of(folder: Path, **options: Any) -> BabilongDataModule:
    settings = {"segment_length": 100, "batch_size": 2, "num_segments": 3, "steps_per_epoch": 4, "eval_steps": 2}
    return BabilongDataModule(str(folder), str(folder / "books"), **{**settings, **options})


def test_an_episode_is_a_book_with_facts_and_ends_with_the_answer(folder: Path) -> None:
    module = module_of(folder)
    module.setup("fit")
    for batch in module.train_dataloader():
        assert batch.tokens.shape == (2, 300)
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            assert tokens[0] == module.tokenizer.bos_token_id
            text = bytes(tokens[1:].tolist()).decode()
            answer = text.rpartition("?")[2]
            assert answer in (" garden.", " office.")
            assert text.endswith(f" Where is Ann?{answer}")
            assert f" Ann moved to the{answer}" in text
            assert text.index("Ann moved") < text.index("Bob went")
            assert "moor of train" in text
            scored = labels != IGNORE_INDEX
            assert bytes(labels[scored].tolist()).decode() == answer
            assert torch.equal(labels[scored], tokens[1:][scored[:-1]])
        assert batch.document_starts.sum(1).tolist() == [1, 1]
        assert batch.num_words.tolist() == [1, 1]
        assert batch.num_bytes.tolist() == (batch.labels != IGNORE_INDEX).sum(1).tolist()
    for batch in module.test_dataloader():
        text = bytes(batch.tokens[0, 1:].tolist()).decode()
        assert "moor of test" in text
        assert text.rpartition("?")[2] in (" cellar.", " attic.")


def test_a_tokenizer_is_trained_and_saved_and_episodes_resume(folder: Path) -> None:
    options: dict[str, Any] = {"num_segments": {0: 1, 2: 3}, "segment_length": 60}
    module = module_of(folder, tokenizer=BytePairTokenizer(280), **options)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert [batch.tokens.shape[1] for batch in batches] == [60, 60, 180, 180]
    state = {**module.state_dict(), "position": 2}
    resumed = module_of(folder, tokenizer=BytePairTokenizer(280), **options)
    resumed.setup("fit")
    resumed.load_state_dict(state)
    assert torch.equal(next(iter(resumed.train_dataloader())).tokens, batches[2].tokens)
    with pytest.raises(CheckpointError, match="segment_length 60, this run's 61"):
        module_of(folder, tokenizer=module.tokenizer, **{**options, "segment_length": 61}).load_state_dict(state)


def test_missing_tasks_and_short_episodes_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="no train file of task 2; it has 1"):
        module_of(folder, tasks=(2,)).sample_batch(1, 3, (0, 0))
    with pytest.raises(DataError, match="No story fits into 1 segments of 20 tokens"):
        module_of(folder, segment_length=20).sample_batch(1, 1, (0, 0))


def test_text_may_follow_the_answer(folder: Path) -> None:
    module = module_of(folder, max_trailing=40)
    module.setup("fit")
    ends = set()
    for batch in module.train_dataloader():
        for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
            scored = (labels != IGNORE_INDEX).nonzero().flatten()
            ends.add(300 - int(scored[-1]) - 2)
            assert torch.equal(labels[scored], tokens[scored + 1])
            assert bytes(labels[scored].tolist()).decode() in (" garden.", " office.")
    assert len(ends) > 3, "the place of the answer varies"
    assert 0 <= min(ends) <= max(ends) <= 40
    with pytest.raises(DataError, match="max_trailing is -1"):
        module_of(folder, max_trailing=-1)
