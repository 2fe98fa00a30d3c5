"""RULER's prompts: their length in tokens, what they hide, and their score."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.data.haystack import encode_ids
from memtx.data.sources.base import Document
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError
from memtx.evaluation.ruler import evaluate_ruler, make_samples, read_haystack, read_questions, score
from memtx.evaluation.ruler_prompts import RULER_TASKS, RulerTexts
from memtx.models.memory_transformer import MemoryTransformer

TOKENIZER = ByteTokenizer()
WORDS = ["".join(letters) for letters in itertools.product("abcdefghij", "abcdefghij", ("ght", "ver"))]
TEXT = " ".join(f"The {word} was dark." for word in WORDS)
ARTICLES = {
    "data": [
        {
            "title": "Moor",
            "paragraphs": [
                {
                    "context": f"Number {number} lives on moor {number}. " + "It is dark there. " * 3,
                    "qas": [
                        {"question": f"Who lives on {number}?", "answers": [{"text": f"Number {number}"}]},
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(6)
            ],
        }
    ]
}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, RulerTexts]:
    (tmp_path / "squad.json").write_text(json.dumps(ARTICLES))
    haystack = read_haystack([Document("a", "a", len(TEXT), text=TEXT)])
    questions = read_questions(str(tmp_path / "squad.json"))
    return {name: questions if name.startswith("qa") else haystack for name in RULER_TASKS}


@pytest.mark.parametrize("name", list(RULER_TASKS))
@pytest.mark.parametrize("length", [6000, 9001])
def test_prompts_fill_the_length_and_have_the_answers(texts: dict[str, RulerTexts], name: str, length: int) -> None:
    task = RULER_TASKS[name]
    samples = make_samples(name, texts[name], TOKENIZER, length, 3, seed=1)
    assert samples is not None
    assert len({sample.prompt for sample in samples}) == 3
    for sample in samples:
        size = len(encode_ids(TOKENIZER, sample.prompt)) + task.max_tokens
        # A unit of filler is at most 130 bytes, except that one rank of coded words may change its count at once.
        assert length * 0.9 < size <= length
        assert all(answer in sample.prompt for answer in sample.answers)
        assert score(task, f"It is {', '.join(sample.answers).upper()}.", sample.answers) == 1.0
        assert score(task, "I do not know", sample.answers) == 0.0
    assert make_samples(name, texts[name], TOKENIZER, length, 3, seed=1) == samples
    assert make_samples(name, texts[name], TOKENIZER, 200, 3, seed=1) is None


def test_needles_are_as_many_as_the_task_has(texts: dict[str, RulerTexts]) -> None:
    for name, num_needles, num_answers in (
        ("niah_single_2", 1, 1), ("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4),
    ):  # fmt: skip
        (sample,) = make_samples(name, texts[name], TOKENIZER, 6000, 1, 0) or ()
        assert sample.prompt.count("One of the special magic numbers for") == num_needles
        assert len(set(sample.answers)) == num_answers
        assert all(re.fullmatch(r"\d{7}", answer) for answer in sample.answers)
    assert "What are all the special magic numbers for" in sample.prompt
    # One needle has a prompt in the singular.
    (sample,) = make_samples("niah_single_1", texts["vt"], TOKENIZER, 2000, 1, 0) or ()
    assert "What is the special magic number for" in sample.prompt


def test_a_chain_of_variables_is_in_order(texts: dict[str, RulerTexts]) -> None:
    (sample,) = make_samples("vt", texts["vt"], TOKENIZER, 5000, 1, 0) or ()
    indices = [sample.prompt.index(f"VAR {name} =") for name in sample.answers]
    assert indices == sorted(indices)
    value = re.search(rf"VAR {sample.answers[0]} = (\d+)", sample.prompt)
    assert value is not None
    assert f"the value {value[1]}, they are: " in sample.prompt


def test_answers_are_the_most_common_words(texts: dict[str, RulerTexts]) -> None:
    (sample,) = make_samples("cwe", texts["cwe"], TOKENIZER, 8000, 1, 0) or ()
    context = sample.prompt.rpartition("Below is a numbered list")[2].rpartition("Question:")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", context))
    assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
    assert {counts[word] for word in sample.answers} == {30}
    (sample,) = make_samples("fwe", texts["fwe"], TOKENIZER, 8000, 1, 0) or ()
    words = Counter(re.findall(r"\b[a-z]{6}\b", sample.prompt.partition("coded words. ")[2].partition("\nQuestion")[0]))
    assert [word for word, _ in words.most_common(3)] == list(sample.answers)
    assert sample.prompt.count("...") > words[sample.answers[0]]


def test_scores_count_all_answers_or_one() -> None:
    assert score(RULER_TASKS["vt"], "ABC, def", ("ABC", "DEF", "GHI", "JKL")) == 0.5
    assert score(RULER_TASKS["qa_1"], "in paris", ("London", "Paris")) == 1.0


def test_questions_are_read_from_every_format(tmp_path: Path) -> None:
    lines = tmp_path / "squad.jsonl"
    entries = [
        {
            "title": "A",
            "context": f"C{n}",
            "question": f"Q{n}?",
            "answers": [{"text": f"C{n}", "answer_start": 0}] * (n < 2),
        }
        for n in range(3)
    ]
    lines.write_text("\n".join(map(json.dumps, entries)))
    texts = read_questions(str(lines))
    assert [question[:2] for question in texts.questions] == [("Q0?", ("C0",)), ("Q1?", ("C1",))]
    assert texts.questions[0][2:] == ((0,), (1, 2))
    hotpot = tmp_path / "hotpot.json"
    hotpot.write_text(json.dumps([{"question": "Q?", "answer": "B", "context": [["T", ["A. ", "B."]], ["U", ["C."]]]}]))
    texts = read_questions(str(hotpot))
    assert (texts.documents, texts.questions) == (["T\nA. B.", "U\nC."], [("Q?", ("B",), (0, 1), ())])
    for content in ("[]", "{}", "3", "not JSON", '[{"context": "C"}]'):
        hotpot.write_text(content)
        with pytest.raises(DataError, match=r"hotpot\.json"):
            read_questions(str(hotpot))


def test_a_haystack_needs_words() -> None:
    with pytest.raises(DataError, match="2 different words"):
        read_haystack([Document("a", "a", 9, text="moor dark")])


def test_every_task_is_evaluated(texts: dict[str, RulerTexts]) -> None:
    torch.manual_seed(0)
    model: Any = MemoryTransformer(TOKENIZER.vocab_size, dim=16, depth=1, heads=2).eval()
    read = list[int]()
    tasks = {name: texts[name] for name in ("vt", "qa_1")}
    results = evaluate_ruler(model, TOKENIZER, tasks, [2500, 100], num_samples=1, on_progress=read.append)
    assert [(result.name, result.distance) for result in results] == [
        ("vt", 2500), ("vt", 100), ("qa_1", 2500), ("qa_1", 100),
    ]  # fmt: skip
    assert [result.accuracy for result in results] == [0.0, None, 0.0, None]
    assert read == [2500, 2500]
