"""bAbI stories hidden in text, answered by fake models that remember a known length of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.data.babi import Story, load_tasks, read_stories
from memtx.data.haystack import Haystack
from memtx.data.sources.base import Document
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError
from memtx.evaluation.accuracy import EvaluationResult, average_by_distance
from memtx.evaluation.babi import evaluate_babi
from memtx.state import MemoryState
from tests.evaluation.readers import RememberingModel, remembers

TOKENIZER = ByteTokenizer()
TEXT = "".join(f"Night {number} was dark and stormy on the moor. " for number in range(200))
HAYSTACK = Haystack([Document("a", "a", len(TEXT), text=TEXT)], TOKENIZER)
STORIES = "1 Ann is at home.\n2 Bob is at work.\n3 Bob is at\twork.\t2\n4 Eve is at sea.\n5 Ann is at\thome.\t1\n"
STORIES += "1 Bob is at sea.\n2 Bob is at\tsea.\t1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qa1_where_test.txt").write_text(STORIES, encoding="utf-8")
    (tmp_path / "qa1_where_train.txt").write_text("not read", encoding="utf-8")
    (tmp_path / "qa12_long_test.txt").write_text(
        "".join(f"{n} Ann is at place {n}.\n" for n in range(1, 60)) + "60 Ann is at\tplace 59.\t59\n", encoding="utf-8"
    )
    return tmp_path


def test_stories_are_read_from_files(folder: Path) -> None:
    tasks = load_tasks(str(folder))
    assert list(tasks) == [1, 12]
    assert [(story.facts, story.answer) for story in tasks[1]] == [
        (("Ann is at home.", "Bob is at work."), "work."),
        (("Ann is at home.", "Bob is at work.", "Eve is at sea."), "home."),
        (("Bob is at sea.",), "sea."),
    ]


def test_hidden_stories_are_answered_as_far_as_text_is_remembered(folder: Path) -> None:
    tasks = load_tasks(str(folder))
    results = evaluate_babi(remembers(3000), TOKENIZER, HAYSTACK, tasks, [600, 2500], num_samples=3)
    # qa12 has a single answer, so there is no choice; its story does not fit into 600.
    assert [(result.name, result.distance, result.accuracy) for result in results] == [
        ("qa1", 600, 1.0), ("qa1", 2500, 1.0), ("qa12", 600, None), ("qa12", 2500, 1.0),
    ]  # fmt: skip
    assert results[0].chance == pytest.approx(1 / 3)
    short = evaluate_babi(remembers(10), TOKENIZER, HAYSTACK, {1: tasks[1]}, [2500], num_samples=3)
    # The model chooses the first answer, "home.", which is right for one of three.
    assert short[0].accuracy == pytest.approx(1 / 3)
    assert average_by_distance("all", results) == [
        EvaluationResult("all", 600, 1.0, pytest.approx(1 / 3)),
        EvaluationResult("all", 2500, 1.0, pytest.approx(2 / 3)),
    ]


class Listener(RememberingModel):
    """Collects every context, ``(length,)`` bytes with the token of the beginning."""

    def __init__(self, length: int) -> None:
        super().__init__(length + 1)
        self.contexts: list[list[int]] = []

    def __call__(self, tokens: Tensor, state: MemoryState, labels: Tensor) -> Any:
        output = super().__call__(tokens, state, labels)
        text = output.state.layers[0][0]
        if text[0, 0] == TOKENIZER.bos_token_id:
            self.contexts += text.tolist()
        return output


def test_facts_are_hidden_in_order_all_over_the_context() -> None:
    """Their depths are those of sorted uniform numbers, in every context others (BABILong, section 2)."""
    facts = tuple(f"Fact {number} is hidden." for number in range(3))
    length, num_contexts = 2000, 40
    listener: Any = Listener(length)
    stories = [Story(facts, f"Who is {number}?", "Ann.") for number in range(num_contexts)]
    evaluate_babi(
        listener, TOKENIZER, HAYSTACK, {1: stories}, [length], num_samples=num_contexts, segment_length=length + 1
    )
    texts = [bytes(context[1:]).decode() for context in listener.contexts]
    assert [len(text) for text in texts] == [length] * num_contexts
    depths = torch.tensor([[text.index(f" {fact}") / length for fact in facts] for text in texts])
    assert bool((depths.diff(dim=1) > 0).all())
    assert len(set(depths[:, 0].tolist())) > num_contexts / 2
    # The k-th of three sorted uniform numbers has mean k / 4 and a standard deviation of at most 0.224, their mean over
    # 40 contexts 0.035; a sentence, at whose nearest end a fact is hidden, is 0.023 of the text.
    assert depths.mean(0).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.13)
    assert depths.min() < 0.1
    assert depths.max() > 0.9


def test_chance_is_the_frequency_of_the_most_common_answer() -> None:
    stories = [Story(("Ann is at home.",), "Ann is at", answer) for answer in ("home.", "sea.", "home.", "home.")]
    (result,) = evaluate_babi(remembers(3000), TOKENIZER, HAYSTACK, {3: stories}, [500], num_samples=4)
    assert (result.accuracy, result.chance) == (0.75, 0.75)


def test_malformed_files_are_reported(folder: Path) -> None:
    for content, message in (("x\n", "line 1"), ("1 Ann is at home.\n", "no question"), ("", "no question")):
        (folder / "qa1_where_test.txt").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_tasks(str(folder))
    (folder / "qa1_where_test.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tasks(str(folder))
    with pytest.raises(DataError, match="is not a folder"):
        load_tasks(str(folder / "none"))


def test_original_babi_files_are_read() -> None:
    root = os.environ.get("MEMTX_DATA")
    if root is None or not (folder := Path(root) / "babi").is_dir():
        pytest.skip("MEMTX_DATA does not name a folder with babi in it")
    stories = read_stories(folder / "qa1_single-supporting-fact_test.txt")
    assert len(stories) == 1000
    assert {story.answer for story in stories} == {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    # The answer is the last place that the person in the question went to.
    for story in stories:
        person = story.question.removeprefix("Where is ").rstrip("? ")
        assert [fact for fact in story.facts if fact.startswith(person)][-1].endswith(f"{story.answer}.")
