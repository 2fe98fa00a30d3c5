"""Chapters of a book, found in its tokens: lines such as "CHAPTER IV" or "Chapter 12. The Return"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memtx.inference.reader import SegmentResult

LONGEST_HEADING = 80
"""Characters of a line that may be a heading."""

LONGEST_LINE = 4 * LONGEST_HEADING + 4
"""Bytes of a line that are kept: more than any heading has."""

SHORTEST_CHAPTER = 200
"""Tokens; a heading sooner than that after another is its subtitle or a table of contents."""

_WORDS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|fifth|sixth|seventh|"
    "eighth|ninth|tenth|last|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twenty|thirty|forty|fifty)(?:-[a-z]+)?"
)
# What follows the number must not go on as a sentence does: "Part I have kept" is no heading.
_HEADING = re.compile(
    r"(?:CHAPTER|Chapter|BOOK|Book|PART|Part|CANTO|Canto|LETTER|Letter|STAVE|Stave|ACT|Act|VOLUME|Volume)\s+"
    rf"(?:[IVXLCDM]+|\d{{1,3}}|(?i:the\s+)?(?i:{_WORDS}))"
    r"(?:\s*[.:,;\u2014\u2013-].*|\s+[A-Z\"\u201c'(\[].*|\s*)"
)


def is_heading(line: str) -> bool:
    """Say whether a line heads a chapter: a word such as CHAPTER, then a number."""
    return len(line) <= LONGEST_HEADING and _HEADING.fullmatch(line.strip(" _*\r\t")) is not None


@dataclass(frozen=True)
class Section:
    """What one part of a book said.

    Attributes:
        title: its heading, or empty.
        start: position of its first token.
        tokens: how many it has.
        bytes: of its text.
        nll: nats.
    """

    title: str = ""
    start: int = 0
    tokens: int = 0
    bytes: int = 0
    nll: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the section; NaN where it is empty."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    def with_tokens(self, result: SegmentResult, first: int, stop: int) -> Section:
        """Return the section with a segment's tokens from ``first`` up to ``stop`` as well."""
        return Section(
            self.title,
            self.start if self.tokens else result.start + first,
            self.tokens + stop - first,
            self.bytes + sum(map(len, result.token_bytes[first:stop])),
            self.nll + float(result.nll[first:stop].sum(dtype=np.float64)),
        )

    def __add__(self, other: Section) -> Section:
        return replace(
            self, tokens=self.tokens + other.tokens, bytes=self.bytes + other.bytes, nll=self.nll + other.nll
        )


class Chapters:
    """Cuts results into chapters, as they come.

    A heading's own line belongs to the chapter that it opens, and so does the token that holds its line break.
    """

    def __init__(self) -> None:
        self.chapter = Section()
        self._line = b""
        self._of_line = Section()

    def feed(self, result: SegmentResult) -> Iterator[Section]:
        """Take a segment and yield the chapters that it ended."""
        parts, first = result.token_bytes, 0
        breaks = [place for place, part in enumerate(parts) if b"\n" in part]
        for stop in (*breaks, len(parts)):
            self._of_line = self._of_line.with_tokens(result, first, min(stop + 1, len(parts)))
            ending, newline, rest = b"".join(parts[first : stop + 1]).partition(b"\n")
            # More than a heading's length is enough to know that it is none: a line of any length costs nothing.
            self._line = (self._line + ending)[:LONGEST_LINE]
            if newline:
                yield from self._end_line()
                self._line = rest.rpartition(b"\n")[2][:LONGEST_LINE]
            first = stop + 1

    def _end_line(self) -> Iterator[Section]:
        text = self._line.decode("utf-8", "replace")
        line, self._of_line = self._of_line, Section()
        if not is_heading(text):
            self.chapter = self.chapter + line
        elif self.chapter.title and self.chapter.tokens < SHORTEST_CHAPTER:
            self.chapter = replace(self.chapter + line, title=" ".join(text.split()))
        else:
            if self.chapter.tokens:
                yield self.chapter
            self.chapter = replace(line, title=" ".join(text.split()))

    def finish(self) -> Section:
        """Return the last chapter, which ends with the book."""
        last, self._of_line, self._line = self.chapter + self._of_line, Section(), b""
        self.chapter = Section()
        return last

    def position(self) -> dict[str, Any]:
        """Return where it stands, as JSON can hold it."""
        return {
            "chapter": vars(self.chapter) | {},
            "line": self._line.decode("latin-1"),
            "of_line": vars(self._of_line) | {},
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Go on from :meth:`position`."""
        self.chapter, self._of_line = Section(**position["chapter"]), Section(**position["of_line"])
        self._line = str(position["line"]).encode("latin-1")
