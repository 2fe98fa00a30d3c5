"""Chapters of a book, recognized by headings such as "CHAPTER IV" or "Chapter 12. The Return"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from memtx.inference.reader import SegmentResult, nats_to_bits_per_byte

MAX_HEADING_CHARS = 80

MAX_LINE_BYTES = 4 * MAX_HEADING_CHARS + 4
"""Maximum number of bytes stored of a line: more than any heading has."""

MIN_CHAPTER_TOKENS = 200
"""A heading that follows another within fewer tokens is its subtitle, or part of a table of contents."""

_NUMBER_WORDS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|fifth|sixth|seventh|"
    "eighth|ninth|tenth|last|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twenty|thirty|forty|fifty)(?:-[a-z]+)?"
)
# The text after the number must not continue as a sentence: "Part I have kept" is not a heading.
_HEADING = re.compile(
    r"(?:CHAPTER|Chapter|BOOK|Book|PART|Part|CANTO|Canto|LETTER|Letter|STAVE|Stave|ACT|Act|VOLUME|Volume)\s+"
    rf"(?:[IVXLCDM]+|\d{{1,3}}|(?i:the\s+)?(?i:{_NUMBER_WORDS}))"
    r"(?:\s*[.:,;\u2014\u2013-].*|\s+[A-Z\"\u201c'(\[].*|\s*)"
)


def is_heading(line: str) -> bool:
    """Return whether a line is a chapter heading: a word such as CHAPTER, then a number."""
    return len(line) <= MAX_HEADING_CHARS and _HEADING.fullmatch(line.strip(" _*\r\t")) is not None


@dataclass(frozen=True)
class BookSection:
    """Scores of a part of a book: its heading, if any, position of its first token, and sums (nll in nats)."""

    title: str = ""
    start: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    nll: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the section; NaN if it is empty."""
        return nats_to_bits_per_byte(self.nll, self.num_bytes)

    def with_tokens(self, result: SegmentResult, start: int, end: int) -> BookSection:
        """Return the section extended by the tokens [start, end) of a segment."""
        nll = float(result.nll[start:end].sum(dtype=np.float64))
        num_bytes = sum(map(len, result.token_bytes[start:end]))
        first = self.start if self.num_tokens else result.start + start
        return replace(self, start=first) + BookSection("", 0, end - start, num_bytes, nll)

    def __add__(self, other: BookSection) -> BookSection:
        num_tokens, num_bytes = self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes
        return replace(self, num_tokens=num_tokens, num_bytes=num_bytes, nll=self.nll + other.nll)


class ChapterSplitter:
    """Splits a reader's results into chapters as they arrive.

    A heading's line, including the token with its line break, belongs to the chapter that it begins.
    """

    def __init__(self) -> None:
        self.chapter = BookSection()
        self._line_bytes = b""
        self._line_section = BookSection()

    def feed(self, result: SegmentResult) -> Iterator[BookSection]:
        """Add a segment and yield the chapters that it completes."""
        token_bytes, start = result.token_bytes, 0
        breaks = [index for index, content in enumerate(token_bytes) if b"\n" in content]
        for end in (*breaks, len(token_bytes)):
            self._line_section = self._line_section.with_tokens(result, start, min(end + 1, len(token_bytes)))
            head, newline, tail = b"".join(token_bytes[start : end + 1]).partition(b"\n")
            # Longer lines are not headings, so a line of any length takes constant memory.
            self._line_bytes = (self._line_bytes + head)[:MAX_LINE_BYTES]
            if newline:
                yield from self._end_line()
                self._line_bytes = tail.rpartition(b"\n")[2][:MAX_LINE_BYTES]
            start = end + 1

    def _end_line(self) -> Iterator[BookSection]:
        text = self._line_bytes.decode("utf-8", "replace")
        line, self._line_section = self._line_section, BookSection()
        if not is_heading(text):
            self.chapter = self.chapter + line
        elif self.chapter.title and self.chapter.num_tokens < MIN_CHAPTER_TOKENS:
            self.chapter = replace(self.chapter + line, title=" ".join(text.split()))
        else:
            if self.chapter.num_tokens:
                yield self.chapter
            self.chapter = replace(line, title=" ".join(text.split()))

    def finish(self) -> BookSection:
        """Return the last chapter."""
        chapter = self.chapter + self._line_section
        self.chapter, self._line_section, self._line_bytes = BookSection(), BookSection(), b""
        return chapter

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serializable values."""
        line = self._line_bytes.decode("latin-1")
        return {"chapter": asdict(self.chapter), "line": line, "line_section": asdict(self._line_section)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`."""
        self.chapter = BookSection(**state_dict["chapter"])
        self._line_section = BookSection(**state_dict["line_section"])
        self._line_bytes = str(state_dict["line"]).encode("latin-1")
