from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError
from memtx.inference.incremental_tokenizer import IncrementalTokenizer


def cut(content: str | bytes, places: list[int]) -> list[str | bytes]:
    borders = sorted({place % (len(content) + 1) for place in places} | {0, len(content)})
    return [content[a:b] for a, b in itertools.pairwise(borders)]


def tokens_of(tokenizer: Tokenizer, parts: list[str | bytes]) -> np.ndarray:
    pieces = IncrementalTokenizer(tokenizer)
    found = [tokens for part in parts for _, tokens in pieces.feed(part)]
    return np.concatenate([*found, pieces.finish()])


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=60), st.integers(1, 60), st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
def test_cutting_never_changes_the_tokens(
    pair_tokenizer: Tokenizer, part: str, times: int, places: list[int], as_bytes: bool
) -> None:
    text = (part + "\n\n") * times
    parts = cut(text.encode() if as_bytes else text, places)
    found = tokens_of(pair_tokenizer, parts)
    assert found.tolist() == pair_tokenizer.encode(text).tolist()
    assert b"".join(pair_tokenizer.token_bytes(int(token)) for token in found).decode() == text


def test_one_byte_at_a_time_decodes_split_characters(byte_tokenizer: Tokenizer) -> None:
    content = "é🙂x".encode()
    found = tokens_of(byte_tokenizer, [content[i : i + 1] for i in range(len(content))])
    assert bytes(found.tolist()) == content


def test_fork_goes_on_by_itself() -> None:
    first = IncrementalTokenizer(ByteTokenizer())
    content = "aé".encode()
    assert [len(tokens) for _, tokens in first.feed(content[:2])] == [0]
    second = first.fork()
    list(first.feed(content[2:]))
    list(second.feed("è".encode()[1:]))
    assert bytes(first.finish().tolist()).decode() == "aé"
    assert bytes(second.finish().tolist()).decode() == "aè"


@pytest.mark.parametrize(
    ("parts", "offset"),
    [([b"ab\xff"], 2), ([b"ab", b"c\xc3", b"("], 3), ([b"x" * 70_000 + b"\xff"], 70_000), ([b"ab\xc3"], 2)],
)
def test_bad_bytes_are_named_by_offset(parts: list[bytes], offset: int) -> None:
    with pytest.raises(DataError, match=f"at byte {offset}\\."):
        tokens_of(ByteTokenizer(), list(parts))


def test_what_waits_is_bounded() -> None:
    pieces = IncrementalTokenizer(ByteTokenizer())
    for _ in range(20):
        for _ in pieces.feed("x" * 50_000):
            assert len(pieces.pending_text) <= 8192
