"""Words of tokens: those of the library's own splitter, for every kind of tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.hf_tokenizers import WordPieceTokenizer
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from tests.data.tokenizer_zoo import BUILDERS

TEXTS = st.lists(
    st.sampled_from(["The", "cats", "sat", ".", " ", "  ", "\n", "don't", "1234", "x12", "störm", "日本", "🙂", "!!"]),
    max_size=12,
).map("".join)

CACHE: dict[str, Any] = {}
# Their splitter leaves a text whole.
WITHOUT_WORDS = {"byte-level-no-regex", "llama2", "gemma", "llama2-metaspace"} | {
    name for name in BUILDERS if name.endswith("unsplit")
}


def partition(word_ids: Sequence[int | None]) -> list[bool]:
    """Return, for each token after the first, True if it begins a word."""
    return [first is None or first != second for first, second in itertools.pairwise(word_ids)]


def tokenizer(name: str) -> Any:
    model = BUILDERS[name]()
    return BytePairTokenizer.from_backend_json(model.to_str(), 0), model


@pytest.mark.parametrize("name", list(BUILDERS))
@given(text=TEXTS)
@settings(max_examples=40, deadline=None)
def test_words_are_those_of_the_library(name: str, text: str) -> None:
    if name not in CACHE:
        CACHE[name] = tokenizer(name)
    ours, model = CACHE[name]
    encoding = model.encode(text, add_special_tokens=False)
    words = ours.word_ids(encoding.ids)
    if name not in WITHOUT_WORDS:
        assert partition(words.tolist()) == partition(encoding.word_ids)
    # An excerpt that begins with a word has the words of the text.
    begins = [0, *np.flatnonzero(np.diff(words)) + 1] if len(words) else [0]
    middle = int(begins[len(begins) // 2])
    assert partition(ours.word_ids(encoding.ids[middle:]).tolist()) == partition(words[middle:].tolist())


# One of them knows no spaces.
@pytest.mark.parametrize("name", sorted(WITHOUT_WORDS - {"metaspace-never-unsplit"}))
def test_without_a_splitter_words_are_runs_of_letters(name: str) -> None:
    ours, _ = tokenizer(name)
    ids = ours.encode_chunk("the cats sat, 1").tolist()
    words = ours.word_ids(ids)
    texts = [b""] * int(words[-1] + 1)
    for word, token in zip(words, ids, strict=True):
        texts[word] += ours.token_bytes(token)
    assert [text.strip() for text in texts if text.strip()] == [b"the", b"cats", b"sat", b",", b"1"]


def test_pieces_of_a_word_continue_it() -> None:
    word_pieces = WordPieceTokenizer(100)
    word_pieces.train(["the cat sat on mats"] * 9)
    ids = word_pieces.encode("the cats sat.")
    spellings = [word_pieces._backend.id_to_token(token) for token in ids]
    assert partition(word_pieces.word_ids(ids).tolist()) == [not piece.startswith("##") for piece in spellings[1:]]
    assert len(set(word_pieces.word_ids(ids).tolist())) == 4


def test_special_tokens_are_words_of_their_own() -> None:
    ours = BytePairTokenizer(300)
    ours.train(["a text of some words"])
    letters, bos = ours.encode("cats").tolist(), ours.bos_token_id
    assert partition(ours.word_ids([*letters, bos, bos, *letters]).tolist()) == [
        *[False] * (len(letters) - 1), True, True, True, *[False] * (len(letters) - 1)
    ]  # fmt: skip
    assert ours.word_ids([]).tolist() == []


def test_bytes_are_runs_of_letters() -> None:
    text = "Call me, störm 19th"
    words = ByteTokenizer().word_ids(list(text.encode()))
    parts = ["".join(map(chr, np.frombuffer(text.encode(), np.uint8)[words == word])) for word in range(words[-1] + 1)]
    assert [part.encode("latin-1").decode() for part in parts] == ["Call", " ", "me", ",", " ", "störm", " ", "19th"]
