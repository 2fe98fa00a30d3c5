from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.inference.chapters import ChapterSplitter, Section, is_heading
from memtx.inference.reader import SegmentResult


@pytest.mark.parametrize(
    "line", ["CHAPTER IV", "Chapter 12. The Return", "  CHAPTER THE FIRST", "BOOK II: Home", "Chapter One", "PART 3"]
)
def test_headings(line: str) -> None:
    assert is_heading(line)


@pytest.mark.parametrize(
    "line",
    ["Part I have kept for myself", "chapter of accidents", "He read CHAPTER IV", "Book I had read,", "", "x" * 99],
)
def test_prose_is_no_heading(line: str) -> None:
    assert not is_heading(line)


def results(text: str, sizes: list[int]) -> list[SegmentResult]:
    borders = [0, *np.cumsum(sizes).tolist()]
    borders = sorted({min(border, len(text)) for border in borders} | {len(text)})
    return [
        SegmentResult(
            np.arange(b - a), np.full(b - a, 0.5, np.float32), [text[i : i + 1].encode() for i in range(a, b)], a
        )
        for a, b in itertools.pairwise(borders)
    ]


BOOK = "Preface" + "p" * 300 + "\nCHAPTER I\n" + "one " * 100 + "\nCHAPTER II\nThe Second\n" + "two " * 90


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 400), max_size=6), st.integers(0, 6))
def test_chapters_add_up_however_cut(sizes: list[int], pause: int) -> None:
    chapters, found = ChapterSplitter(), list[Section]()
    for index, result in enumerate(results(BOOK, sizes)):
        if index == pause:
            # Through a session file and back.
            position = json.loads(json.dumps(chapters.state_dict()))
            chapters = ChapterSplitter()
            chapters.load_state_dict(position)
        found += chapters.feed(result)
    found.append(chapters.finish())
    assert [section.title for section in found] == ["", "CHAPTER I", "CHAPTER II"]
    assert [section.start for section in found] == [0, BOOK.index("CHAPTER I"), BOOK.index("CHAPTER II")]
    assert sum(section.num_bytes for section in found) == len(BOOK)
    assert sum(section.nll for section in found) == pytest.approx(0.5 * len(BOOK))


def test_a_table_of_contents_is_one_part() -> None:
    chapters = ChapterSplitter()
    text = "".join(f"CHAPTER {number}\n" for number in ("I", "II", "III")) + "x" * 300
    assert [section for result in results(text, []) for section in chapters.feed(result)] == []
    assert chapters.finish().title == "CHAPTER III"
