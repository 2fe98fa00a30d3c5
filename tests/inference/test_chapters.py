from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.inference.chapters import BookSection, ChapterSplitter, is_heading
from memtx.inference.reader import SegmentResult


@pytest.mark.parametrize(
    "line", ["CHAPTER IV", "Chapter 12. The Return", "  CHAPTER THE FIRST", "BOOK II: Home", "Chapter One", "PART 3"]
)
def test_headings_are_recognized(line: str) -> None:
    assert is_heading(line)


@pytest.mark.parametrize(
    "line",
    ["Part I have kept for myself", "chapter of accidents", "He read CHAPTER IV", "Book I had read,", "", "x" * 99],
)
def test_prose_is_not_a_heading(line: str) -> None:
    assert not is_heading(line)


def segment_results(text: str, lengths: list[int]) -> list[SegmentResult]:
    borders = [0, *np.cumsum(lengths).tolist()]
    borders = sorted({min(border, len(text)) for border in borders} | {len(text)})
    return [
        SegmentResult(
            np.arange(end - start),
            np.full(end - start, 0.5, np.float32),
            [text[index : index + 1].encode() for index in range(start, end)],
            start,
        )
        for start, end in itertools.pairwise(borders)
    ]


BOOK = "Preface" + "p" * 300 + "\nCHAPTER I\n" + "one " * 100 + "\nCHAPTER II\nThe Second\n" + "two " * 90


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 400), max_size=6), st.integers(0, 6))
def test_chapters_do_not_depend_on_the_segments(lengths: list[int], resume_index: int) -> None:
    splitter, chapters = ChapterSplitter(), list[BookSection]()
    for index, result in enumerate(segment_results(BOOK, lengths)):
        if index == resume_index:
            # Through JSON, as in a session file.
            state_dict = json.loads(json.dumps(splitter.state_dict()))
            splitter = ChapterSplitter()
            splitter.load_state_dict(state_dict)
        chapters += splitter.feed(result)
    chapters.append(splitter.finish())
    assert [chapter.title for chapter in chapters] == ["", "CHAPTER I", "CHAPTER II"]
    assert [chapter.start for chapter in chapters] == [0, BOOK.index("CHAPTER I"), BOOK.index("CHAPTER II")]
    assert sum(chapter.num_bytes for chapter in chapters) == len(BOOK)
    assert sum(chapter.nll for chapter in chapters) == pytest.approx(0.5 * len(BOOK))


def test_a_table_of_contents_is_one_section() -> None:
    splitter = ChapterSplitter()
    text = "".join(f"CHAPTER {number}\n" for number in ("I", "II", "III")) + "x" * 300
    assert [chapter for result in segment_results(text, []) for chapter in splitter.feed(result)] == []
    assert splitter.finish().title == "CHAPTER III"
