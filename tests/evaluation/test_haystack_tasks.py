"""Needles and stories, measured with readers that keep a known length of text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memtx.data.sources.base import Document
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError, MemtxError
from memtx.evaluation.babi import Story, evaluate_babi, load_tasks, read_stories
from memtx.evaluation.haystack import Haystack
from memtx.evaluation.needle import evaluate_needle
from memtx.evaluation.results import EvaluationResult, average_by_distance
from tests.evaluation.readers import keeps

TOKENIZER = ByteTokenizer()
TEXT = "".join(f"Night {number} was dark and stormy on the moor. " for number in range(200))
HAYSTACK = Haystack([Document("a", "a", len(TEXT), text=TEXT)], TOKENIZER)
TOLD = "1 Ann is at home.\n2 Bob is at work.\n3 Bob is at\twork.\t2\n4 Eve is at sea.\n5 Ann is at\thome.\t1\n"
TOLD += "1 Bob is at sea.\n2 Bob is at\tsea.\t1\n"


def test_needles_are_found_as_far_as_text_is_kept() -> None:
    whole = keeps(3000)
    found = evaluate_needle(whole, TOKENIZER, HAYSTACK, [1000, 2000], num_depths=4, num_samples=3)
    assert [one.name for one in found] == ["depth 0%", "depth 33%", "depth 67%", "depth 100%"] * 2
    assert [one.distance for one in found] == [1000] * 4 + [2000] * 4
    assert all(one.accuracy == 1.0 and one.chance == 0.25 for one in found)
    # Each context is read once, whatever is asked of it: the rest are questions and answers alone.
    asked = 2 * 4 * 3 * 4 * len(" The password of the harbour is copper. x")
    assert 3 * (1001 + 2001) < whole.read < 3 * (1001 + 2001) + asked
    short = evaluate_needle(keeps(500), TOKENIZER, HAYSTACK, [2000], num_depths=4, num_samples=3, seed=1)
    # 33% of 2,000 from the end is farther than 500; a reader that knows nothing says the first answer.
    assert [one.accuracy for one in short] == [1.0, 0.0, 0.0, 1.0]


def test_needles_that_cannot_be_are_named() -> None:
    with pytest.raises(MemtxError, match="do not fit into 100"):
        evaluate_needle(keeps(9), TOKENIZER, HAYSTACK, [100], num_samples=1)
    for depths in (1, 11):
        with pytest.raises(MemtxError, match=f"There are {depths} depths"):
            evaluate_needle(keeps(9), TOKENIZER, HAYSTACK, [1000], num_depths=depths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qa1_where_test.txt").write_text(TOLD, encoding="utf-8")
    (tmp_path / "qa1_where_train.txt").write_text("not read", encoding="utf-8")
    (tmp_path / "qa12_long_test.txt").write_text(
        "".join(f"{n} Ann is at place {n}.\n" for n in range(1, 60)) + "60 Ann is at\tplace 59.\t59\n", encoding="utf-8"
    )
    return tmp_path


def test_stories_are_read(folder: Path) -> None:
    tasks = load_tasks(str(folder))
    assert list(tasks) == [1, 12]
    assert [(one.facts, one.answer) for one in tasks[1]] == [
        (("Ann is at home.", "Bob is at work."), "work."),
        (("Ann is at home.", "Bob is at work.", "Eve is at sea."), "home."),
        (("Bob is at sea.",), "sea."),
    ]


def test_hidden_stories_are_answered_as_far_as_text_is_kept(folder: Path) -> None:
    tasks = load_tasks(str(folder))
    whole = evaluate_babi(keeps(3000), TOKENIZER, HAYSTACK, tasks, [600, 2500], num_samples=3)
    # One answer alone is no choice; the long story does not fit into 600.
    assert [(one.name, one.distance, one.accuracy) for one in whole] == [
        ("qa1", 600, 1.0), ("qa1", 2500, 1.0), ("qa12", 600, None), ("qa12", 2500, 1.0),
    ]  # fmt: skip
    assert whole[0].chance == pytest.approx(1 / 3)
    short = evaluate_babi(keeps(10), TOKENIZER, HAYSTACK, {1: tasks[1]}, [2500], num_samples=3)
    # It says the first answer, "home.", which one of the three has.
    assert short[0].accuracy == pytest.approx(1 / 3)
    assert average_by_distance("all", whole) == [
        EvaluationResult("all", 600, 1.0, pytest.approx(1 / 3)),
        EvaluationResult("all", 2500, 1.0, pytest.approx(2 / 3)),
    ]


def test_chance_is_the_most_frequent_answer() -> None:
    often = [Story(("Ann is at home.",), "Ann is at", answer) for answer in ("home.", "sea.", "home.", "home.")]
    (only,) = evaluate_babi(keeps(3000), TOKENIZER, HAYSTACK, {3: often}, [500], num_samples=4)
    assert (only.accuracy, only.chance) == (0.75, 0.75)


def test_files_that_cannot_be_used_are_named(folder: Path) -> None:
    for content, said in (("x\n", "line 1"), ("1 Ann is at home.\n", "no question"), ("", "no question")):
        (folder / "qa1_where_test.txt").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            load_tasks(str(folder))
    (folder / "qa1_where_test.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tasks(str(folder))
    with pytest.raises(DataError, match="no folder"):
        load_tasks(str(folder / "none"))


def test_the_real_tasks() -> None:
    root = os.environ.get("MEMTX_DATA")
    if root is None or not (place := Path(root) / "babi").is_dir():
        pytest.skip("MEMTX_DATA does not name a folder with babi in it")
    told = read_stories(place / "qa1_single-supporting-fact_test.txt")
    assert len(told) == 1000
    assert {one.answer for one in told} == {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    # The answer is where the person asked about went last.
    for one in told:
        person = one.question.removeprefix("Where is ").rstrip("? ")
        assert [fact for fact in one.facts if fact.startswith(person)][-1].endswith(f"{one.answer}.")
