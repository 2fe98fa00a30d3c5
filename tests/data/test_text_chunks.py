from __future__ import annotations

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.text_chunks import HARD_LIMIT, TextSplitter, WordCounter, split_text

# Few letters and long repeats, so that texts reach past the soft and hard limits and cuts fall into runs.
run = st.tuples(
    st.sampled_from(["a", "é", " ", "\n", "\n\n", "\r\n", "\r\n\r\n", "ab ", "\t", "日本", "x\n"]), st.integers(1, 3000)
)
texts = st.lists(run, max_size=14).map(lambda runs: "".join(part * times for part, times in runs))


@settings(deadline=None, max_examples=80)
@given(texts, st.lists(st.integers(0, 40_000), max_size=12))
def test_chunks_do_not_depend_on_how_the_text_arrives(text: str, cuts: list[int]) -> None:
    splitter = TextSplitter()
    borders = sorted({0, len(text), *(border % (len(text) + 1) for border in cuts)})
    pieces: list[str] = []
    for begin, end in itertools.pairwise(borders):
        pieces += splitter.feed(text[begin:end])
        assert len(splitter.pending) <= HARD_LIMIT
    pieces += splitter.flush()
    assert pieces == split_text(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= HARD_LIMIT for piece in pieces)


@settings(deadline=None, max_examples=8)
@given(texts)
def test_character_by_character_gives_the_same_chunks(text: str) -> None:
    text = text[:20_000]
    splitter = TextSplitter()
    pieces = [piece for letter in text for piece in splitter.feed(letter)]
    assert pieces + splitter.flush() == split_text(text)


def test_a_chunk_ends_after_the_blank_lines_of_a_paragraph() -> None:
    paragraph = "word " * 300 + "end.\n\n\n"
    assert split_text(paragraph * 4) == [paragraph] * 4


def test_a_chunk_ends_before_the_space_of_a_word() -> None:
    pieces = split_text("word " * 3000)
    assert all(piece.startswith(" word") and piece.endswith(" word") for piece in pieces[1:-1])


def test_one_long_line_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        text = "x" * size
        begin = time.perf_counter()
        assert len(split_text(text)) == size // HARD_LIMIT
        return time.perf_counter() - begin

    # Quadratic would be 64 times; 25 leaves room for a busy machine.
    assert seconds(64 * 100 * HARD_LIMIT) < 25 * max(seconds(8 * 100 * HARD_LIMIT), 0.005)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.sampled_from("ab \n\u2003é"), max_size=6)))
def test_word_counts_are_those_of_the_whole_text(pieces: list[str]) -> None:
    counter = WordCounter()
    for piece in pieces:
        counter.update(piece)
    text = "".join(pieces)
    assert (counter.num_words, counter.num_bytes) == (len(text.split()), len(text.encode()))
