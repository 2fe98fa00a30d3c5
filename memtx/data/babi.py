"""Stories of bAbI (Weston et al. 2015): facts in order, a question about them, and its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from memtx.data.encodings import Utf8Decoder
from memtx.errors import DataError

FORMAT_HINT = "Give a folder with files such as qa1_single-supporting-fact_test.txt, with numbered lines."

_FILE_PATTERN = re.compile(r"qa(\d+)_.*_(train|test)\.txt")
_LINE_PATTERN = re.compile(r"(\d+) (.+)")


@dataclass(frozen=True)
class Story:
    """A question and the facts before it, in order."""

    facts: tuple[str, ...]
    question: str
    answer: str


def read_stories(path: Path) -> list[Story]:
    """Read the questions in a file: lines of a story are numbered from 1; a tab separates question and answer."""
    stories: list[Story] = []
    facts: list[str] = []
    lines = Utf8Decoder(f"'{path}'").decode(path.read_bytes(), final=True).splitlines()
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (match := _LINE_PATTERN.fullmatch(line.rstrip())) is None:
            raise DataError(f"'{path}', line {line_number} is not a number and a sentence.", FORMAT_HINT)
        if match[1] == "1":
            facts = []
        text, *answer = match[2].split("\t")
        if answer:
            stories.append(Story(tuple(facts), text.strip(), answer[0].strip()))
        else:
            facts.append(text.strip())
    if not stories:
        raise DataError(f"'{path}' has no question.", FORMAT_HINT)
    return stories


def load_tasks(folder: str, split: str = "test") -> dict[int, list[Story]]:
    """Load the stories of each task that has a file of a split (``train`` or ``test``) in the folder, by task number.

    Raises DataError if the folder does not exist or has no such file, or a file is malformed, not UTF-8 or has no
    questions.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"'{folder}' is not a folder.", FORMAT_HINT)
    matches = {path: _FILE_PATTERN.fullmatch(path.name) for path in root.iterdir()}
    paths = {int(match[1]): path for path, match in matches.items() if match and match[2] == split}
    if not paths:
        raise DataError(f"'{folder}' has no bAbI {split} file.", FORMAT_HINT)
    return {number: read_stories(paths[number]) for number in sorted(paths)}
