"""Chapters of a book, found in its tokens: lines such as "CHAPTER IV" or "Chapter 12. The Return"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memtx.inference.reader import SegmentResult

MAX_HEADING_CHARS = 80
"""Characters of a line that may be a heading."""

MAX_LINE_BYTES = 4 * MAX_HEADING_CHARS + 4
"""Bytes of a line that are kept: more than any heading has."""

MIN_CHAPTER_TOKENS = 200
"""Tokens; a heading sooner than that after another is its subtitle or a table of contents."""

_NUMBER_WORDS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|fifth|sixth|seventh|"
    "eighth|ninth|tenth|last|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twenty|thirty|forty|fifty)(?:-[a-z]+)?"
)
# What follows the number must not go on as a sentence does: "Part I have kept" is no heading.
_HEADING = re.compile(
    r"(?:CHAPTER|Chapter|BOOK|Book|PART|Part|CANTO|Canto|LETTER|Letter|STAVE|Stave|ACT|Act|VOLUME|Volume)\s+"
    rf"(?:[IVXLCDM]+|\d{{1,3}}|(?i:the\s+)?(?i:{_NUMBER_WORDS}))"
    r"(?:\s*[.:,;\u2014\u2013-].*|\s+[A-Z\"\u201c'(\[].*|\s*)"
)


def is_heading(line: str) -> bool:
    """Say whether a line heads a chapter: a word such as CHAPTER, then a number."""
    return len(line) <= MAX_HEADING_CHARS and _HEADING.fullmatch(line.strip(" _*\r\t")) is not None


@dataclass(frozen=True)
class Section:
    """What one part of a book said.

    Attributes:
        title: its heading, or empty.
        start: position of its first token.
        num_tokens: how many it has.
        num_bytes: of its text.
        nll: nats.
    """

    title: str = ""
    start: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    nll: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the section; NaN where it is empty."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def with_tokens(self, result: SegmentResult, start: int, end: int) -> Section:
        """Return the section with a segment's tokens from ``start`` up to ``end`` as well."""
        return Section(
            self.title,
            self.start if self.num_tokens else result.start + start,
            self.num_tokens + end - start,
            self.num_bytes + sum(map(len, result.token_bytes[start:end])),
            self.nll + float(result.nll[start:end].sum(dtype=np.float64)),
        )

    def __add__(self, other: Section) -> Section:
        return replace(
            self,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
            nll=self.nll + other.nll,
        )


class ChapterSplitter:
    """Cuts results into chapters, as they come.

    A heading's own line belongs to the chapter that it opens, and so does the token that holds its line break.
    """

    def __init__(self) -> None:
        self.chapter = Section()
        self._line_bytes = b""
        self._line_section = Section()

    def feed(self, result: SegmentResult) -> Iterator[Section]:
        """Take a segment and yield the chapters that it ended."""
        parts, first = result.token_bytes, 0
        breaks = [place for place, part in enumerate(parts) if b"\n" in part]
        for stop in (*breaks, len(parts)):
            self._line_section = self._line_section.with_tokens(result, first, min(stop + 1, len(parts)))
            ending, newline, rest = b"".join(parts[first : stop + 1]).partition(b"\n")
            # More than a heading's length is enough to know that it is none: a line of any length costs nothing.
            self._line_bytes = (self._line_bytes + ending)[:MAX_LINE_BYTES]
            if newline:
                yield from self._end_line()
                self._line_bytes = rest.rpartition(b"\n")[2][:MAX_LINE_BYTES]
            first = stop + 1

    def _end_line(self) -> Iterator[Section]:
        text = self._line_bytes.decode("utf-8", "replace")
        line, self._line_section = self._line_section, Section()
        if not is_heading(text):
            self.chapter = self.chapter + line
        elif self.chapter.title and self.chapter.num_tokens < MIN_CHAPTER_TOKENS:
            self.chapter = replace(self.chapter + line, title=" ".join(text.split()))
        else:
            if self.chapter.num_tokens:
                yield self.chapter
            self.chapter = replace(line, title=" ".join(text.split()))

    def finish(self) -> Section:
        """Return the last chapter, which ends with the book."""
        last, self._line_section, self._line_bytes = self.chapter + self._line_section, Section(), b""
        self.chapter = Section()
        return last

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands, as JSON can hold it."""
        return {
            "chapter": vars(self.chapter) | {},
            "line": self._line_bytes.decode("latin-1"),
            "line_section": vars(self._line_section) | {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.chapter, self._line_section = Section(**state_dict["chapter"]), Section(**state_dict["line_section"])
        self._line_bytes = str(state_dict["line"]).encode("latin-1")
