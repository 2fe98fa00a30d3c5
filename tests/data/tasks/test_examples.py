from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.tasks.examples import (
    PairExample,
    QuestionExample,
    SummaryExample,
    TaggedExample,
    TextExample,
    read_examples,
    split_path,
)
from memtx.errors import DataError
from tests.tasks import records, write_lines

KINDS: dict[str, Any] = {
    "classification": TextExample,
    "matching": PairExample,
    "tagging": TaggedExample,
    "questions": QuestionExample,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_line_is_an_example_with_its_number(kind: str, tmp_path: Path) -> None:
    lines = records(kind)
    path = write_lines(tmp_path / "a.jsonl", lines)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # A blank line counts as a line.
    examples = read_examples(path, KINDS[kind].parse)
    assert [number for number, _ in examples] == [1, *range(3, len(lines) + 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": "b"', "line 2: Not JSON"),
        ("[1]", "line 2: A list, expected a JSON object"),
        ('{"txet": "a", "label": "b"}', "line 2: There is no 'text'. Did you mean 'txet'?"),
        ('{"text": " ", "label": "b"}', "line 2: 'text' is \" \""),
        ('{"text": 3, "label": "b"}', "line 2: 'text' is 3"),
        ('{"text": "a"}', "line 2: There is no 'label'"),
        ('{"text": "a", "label": ["b"]}', "line 2: 'label' is"),
        ("\udcff", "line 2: Not UTF-8"),
        ("[" * 100_000, "line 2: Not JSON"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "label": "b"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(DataError) as raised:
        read_examples(path, TextExample.parse)
    assert f"'{path}', {message}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"text": "night", "answer_start": 30}, "outside its context"),
        ({"text": "night", "answer_start": -1}, "outside its context"),
        ({"text": "night", "answer_start": 1}, "the context has"),
        ({"text": "night"}, "answer_start null"),
        ({"text": "", "answer_start": 0}, "expected text and answer_start"),
        ("night", "expected text and answer_start"),
    ],
)
def test_an_answer_must_be_in_its_context(answer: Any, message: str) -> None:
    record = {"context": "It was a dark night.", "question": "What was?", "answers": [answer], "is_impossible": False}
    with pytest.raises(DataError, match=message):
        QuestionExample.parse(record)


def test_answers_and_is_impossible_must_agree() -> None:
    record: dict[str, Any] = {"context": "a", "question": "b", "answers": [], "is_impossible": False}
    with pytest.raises(DataError, match="'is_impossible' is not true"):
        QuestionExample.parse(record)
    assert QuestionExample.parse(record | {"is_impossible": True}).answers == ()
    with pytest.raises(DataError, match="impossible and has 1"):
        QuestionExample.parse(record | {"is_impossible": True, "answers": [{"text": "a", "answer_start": 0}]})
    assert QuestionExample.parse({"context": "a", "question": "b"}, False).answers is None


def test_labels_may_be_missing_in_prediction() -> None:
    assert TextExample.parse({"text": "a"}, False) == TextExample("a")
    assert SummaryExample.parse({"text": "a"}, False) == SummaryExample("a")
    assert TaggedExample.parse({"tokens": ["a"]}, False) == TaggedExample(("a",))
    with pytest.raises(DataError, match="2 tokens and 1 tags"):
        TaggedExample.parse({"tokens": ["a", "b"], "tags": ["O"]})
    assert TextExample.parse({"text": "a", "label": 3}).label == "3"


def test_missing_and_empty_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "no.jsonl", TextExample.parse)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no example"):
        read_examples(tmp_path / "empty.jsonl", TextExample.parse)


FIELDS = ["text", "tokens", "tags", "answers", "context", "question", "answer_start", "is_impossible", "label"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner),
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES), st.sampled_from(list(KINDS)), st.booleans())
def test_any_record_is_an_example_or_a_clear_error(record: Any, kind: str, labelled: bool) -> None:
    try:
        example = KINDS[kind].parse(json.loads(json.dumps(record)), labelled)
    except DataError as error:
        refusal = error
    else:
        assert isinstance(example, KINDS[kind])
        return
    assert refusal.message
    assert refusal.hint


def test_the_names_of_splits_are_those_of_texts(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.jsonl", "dev.jsonl", "contest.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert split_path(str(tmp_path), "train").name == "train-00000-of-00001.jsonl"
    assert split_path(str(tmp_path), "validation").name == "dev.jsonl"
    with pytest.raises(DataError, match=r"has no test\.jsonl"):
        split_path(str(tmp_path), "test")
    (tmp_path / "valid.jsonl").touch()
    with pytest.raises(DataError, match=r"has dev\.jsonl, valid\.jsonl for validation, expected one file"):
        split_path(str(tmp_path), "validation")
    (tmp_path / "validation.jsonl").touch()
    assert split_path(str(tmp_path), "validation").name == "validation.jsonl"
