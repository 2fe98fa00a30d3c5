"""Examples of tasks: one JSON object a line, checked as it is read; errors name file and line.

The fields are those of published datasets: ``{"text", "label"}``, ``{"text_a", "text_b", "label"}``, ``{"tokens",
"tags"}`` (CoNLL), SQuAD's ``{"id", "title", "context", "question", "answers", "is_impossible"}`` and ``{"text",
"summary"}``; those of further tasks are in their classes. Further fields are ignored.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from memtx.data.sources.splits import infer_splits
from memtx.data.tasks.record_fields import (
    check_list,
    get_label,
    get_text,
    get_texts,
    missing_field,
    parse_record,
    preview,
)
from memtx.data.tasks.turns import format_turns, has_turns, parse_dialogue, parse_turns
from memtx.errors import DataError

E = TypeVar("E")

LAYOUT_HINT = "It holds train.jsonl, validation.jsonl and test.jsonl, one JSON object a line."


@dataclass(frozen=True)
class TextExample:
    """A text and its label; ``label`` is None if it is to be predicted."""

    text: str
    label: str | None = None

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        return cls(get_text(record, "text"), get_label(record, labelled))


@dataclass(frozen=True)
class MultiLabelExample:
    """A text and any number of labels; ``labels`` is None if they are to be predicted."""

    text: str
    labels: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        has_labels = labelled or record.get("labels") is not None
        return cls(get_text(record, "text"), get_texts(record, "labels") if has_labels else None)


@dataclass(frozen=True)
class DialogueExample:
    """Turns of a dialogue and its label; ``label`` is None if it is to be predicted."""

    turns: tuple[str, ...]  # "role: content", oldest first
    label: str | None = None

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        return cls(tuple(map(str, parse_turns(record))), get_label(record, labelled))


@dataclass(frozen=True)
class PairExample:
    """Two texts and the label of their relation; ``label`` is None if it is to be predicted."""

    text_a: str
    text_b: str
    label: str | None = None

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        return cls(get_text(record, "text_a"), get_text(record, "text_b"), get_label(record, labelled))


@dataclass(frozen=True)
class TaggedExample:
    """Words and one tag for each; ``tags`` is None if they are to be predicted."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    word_spans: tuple[tuple[int, int], ...] | None = None  # first and last (exclusive) characters in a raw text
    text: str = ""  # the raw text

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        tokens = get_texts(record, "tokens")
        if not tokens:
            raise DataError("'tokens' is empty.", "Give at least one, or remove the line.")
        if not labelled and record.get("tags") is None:
            return cls(tokens)
        tags = get_texts(record, "tags")
        if len(tags) != len(tokens):
            raise DataError(f"There are {len(tokens)} tokens and {len(tags)} tags.", "Give one tag a token.")
        return cls(tokens, tags)


@dataclass(frozen=True)
class Answer:
    """An answer: its text and its first character in the context."""

    text: str
    start: int


@dataclass(frozen=True)
class QuestionExample:
    """A question about a context; ``answers`` is None if they are to be predicted, empty if there is none."""

    context: str
    question: str
    answers: tuple[Answer, ...] | None = None
    id: str = ""
    title: str = ""

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record; raises DataError."""
        context, question = get_text(record, "context"), get_text(record, "question")
        example_id, title = str(record.get("id", "")), str(record.get("title", ""))
        values = record.get("answers")
        impossible = record.get("is_impossible", False)
        if not isinstance(impossible, bool):
            raise DataError(f"'is_impossible' is {preview(impossible)}, expected true or false.", "Correct it.")
        if values is None and not impossible:
            if labelled:
                raise missing_field(record, "answers")
            return cls(context, question, None, example_id, title)
        answers = tuple(
            _parse_answer(value, index, context) for index, value in enumerate(check_list(values or [], "answers"))
        )
        if impossible and answers:
            raise DataError(f"The question is impossible and has {len(answers)} answers.", "Change one of the two.")
        if not impossible and not answers:
            message = "'answers' is empty and 'is_impossible' is not true."
            raise DataError(message, "Give an answer, or set is_impossible to true.")
        return cls(context, question, answers, example_id, title)


@dataclass(frozen=True)
class SummaryExample:
    """A text and its summary, or a dialogue and its response; ``summary`` is None if it is to be generated."""

    text: str
    summary: str | None = None
    is_dialogue: bool = False

    @property
    def output_name(self) -> str:
        """Name of the generated text in a prediction."""
        return "response" if self.is_dialogue else "summary"

    @classmethod
    def parse(cls, record: Mapping[str, Any], labelled: bool = True) -> Self:
        """Return the example of a record, a dialogue if it has turns; raises DataError."""
        if has_turns(record):
            turns, response = parse_dialogue(record, labelled)
            return cls(format_turns(turns), response, True)
        summary = get_text(record, "summary") if labelled or record.get("summary") is not None else None
        return cls(get_text(record, "text"), summary)


@dataclass(frozen=True)
class SummaryPrompt:
    """The strings around a text and its summary, in training and generation; no summary contains ``stop_sequence``.

    Raises DataError if one of them is empty.
    """

    prompt: str = "\nSummary: "
    stop_sequence: str = "\n\n"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value:
                raise DataError(f"{name} is empty.", f"Give --data.{name} a text.")

    def format_prompt(self, text: str) -> str:
        """Return the text that a summary continues."""
        return text + self.prompt

    def format_completion(self, summary: str) -> str:
        """Return the text to generate; raises DataError if the summary contains the stop sequence."""
        if self.stop_sequence in summary:
            message = f"The summary holds the stop sequence {self.stop_sequence!r}."
            raise DataError(message, "Change --data.stop_sequence.")
        return summary + self.stop_sequence


def read_examples(
    path: str | os.PathLike[str], parse: Callable[[Mapping[str, Any], bool], E], *, labelled: bool = True
) -> list[tuple[int, E]]:
    """Read a file of examples, each with its line number (from 1).

    Raises DataError if the file is missing or empty, or a line is broken; it names file and line.

    Args:
        path: File with one JSON object a line, in UTF-8; blank lines are skipped.
        parse: ``parse`` of an example class or a task.
        labelled: If True, every line must have its labels.
    """
    try:
        with open(path, "rb") as file:
            examples = list(iter_examples(file, str(path), parse, labelled=labelled))
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist.", "Check the path.") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.", "Check the path.") from error
    if not examples:
        raise DataError(f"'{path}' holds no example.", "Give one JSON object a line.")
    return examples


def iter_examples(
    file: Iterable[bytes], name: str, parse: Callable[[Mapping[str, Any], bool], E], *, labelled: bool = True
) -> Iterator[tuple[int, E]]:
    """Yield line number (from 1) and example of every line that is not blank; raises as :func:`read_examples`."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, parse(parse_record(record), labelled)
        except DataError as error:
            raise DataError(f"'{name}', line {number}: {error.message}", error.hint) from error


def split_path(root: str | None, split: str) -> Path:
    """Return the file of a split in a folder of examples; raises DataError if there is none, or several."""
    if (path := find_split(root, split)) is None:
        raise DataError(f"'{root}' has no {split}.jsonl.", LAYOUT_HINT)
    return path


def find_split(root: str | None, split: str) -> Path | None:
    """Return ``SPLIT.jsonl`` of a folder, else the one JSON lines file whose name gives the split, such as dev.jsonl.

    Raises DataError if there are several, or no folder.
    """
    if root is None:
        raise DataError("data.root is not set, expected a folder of examples.", LAYOUT_HINT)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"'{root}' is no folder, expected one of examples.", LAYOUT_HINT)
    if (folder / f"{split}.jsonl").is_file():
        return folder / f"{split}.jsonl"
    paths = sorted(path for path in folder.glob("*.*") if path.suffix in (".jsonl", ".ndjson") and path.is_file())
    splits = infer_splits([path.name for path in paths])
    matches = [path for path, name in zip(paths, splits, strict=True) if name == split]
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise DataError(f"'{folder}' has {names} for {split}, expected one file.", f"Join them into {split}.jsonl.")
    return matches[0] if matches else None


def _parse_answer(value: Any, index: int, context: str) -> Answer:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"]:
        raise DataError(f"answers[{index}] is {preview(value)}, expected text and answer_start.", "Correct it.")
    text, start = value["text"], value.get("answer_start")
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"answers[{index}] has answer_start {preview(start)}, expected a number.", "Correct it.")
    if start < 0 or start + len(text) > len(context):
        raise DataError(
            f"answers[{index}] lies outside its context: {preview(text)} at {start} to {start + len(text)}, the "
            f"context has {len(context)} characters.",
            "answer_start counts characters from 0.",
        )
    if (actual := context[start : start + len(text)]) != text:
        message = f"answers[{index}] is {preview(text)}, the context has {preview(actual)} at {start}."
        raise DataError(message, "answer_start counts characters (not bytes) from 0.")
    return Answer(text, start)
