from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import DataError
from memtx.inference.incremental_tokenizer import IncrementalTokenizer


def split(content: str | bytes, offsets: list[int]) -> list[str | bytes]:
    borders = sorted({offset % (len(content) + 1) for offset in offsets} | {0, len(content)})
    return [content[start:end] for start, end in itertools.pairwise(borders)]


def tokenize(tokenizer: Tokenizer, parts: list[str | bytes]) -> np.ndarray:
    incremental = IncrementalTokenizer(tokenizer)
    tokens = [tokens.ids for part in parts for _, tokens in incremental.feed(part)]
    return np.concatenate([*tokens, incremental.finish().ids])


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=60), st.integers(1, 60), st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
def test_tokens_do_not_depend_on_the_chunks(
    pair_tokenizer: Tokenizer, paragraph: str, repeats: int, offsets: list[int], as_bytes: bool
) -> None:
    text = (paragraph + "\n\n") * repeats
    tokens = tokenize(pair_tokenizer, split(text.encode() if as_bytes else text, offsets))
    assert tokens.tolist() == pair_tokenizer.encode(text).tolist()
    assert b"".join(pair_tokenizer.token_bytes(int(token)) for token in tokens).decode() == text


def test_characters_split_into_bytes_are_decoded(byte_tokenizer: Tokenizer) -> None:
    content = "é🙂x".encode()
    tokens = tokenize(byte_tokenizer, [content[index : index + 1] for index in range(len(content))])
    assert bytes(tokens.tolist()) == content


def test_a_new_tokenizer_continues_from_pending_text_and_bytes() -> None:
    first = IncrementalTokenizer(ByteTokenizer())
    content = "aé".encode()
    assert [len(tokens.ids) for _, tokens in first.feed(content[:2])] == [0]
    second = IncrementalTokenizer(
        ByteTokenizer(),
        pending_text=first.pending_text,
        pending_bytes=first.pending_bytes,
        bytes_consumed=first.bytes_consumed,
    )
    list(first.feed(content[2:]))
    list(second.feed("è".encode()[1:]))
    assert bytes(first.finish().ids.tolist()).decode() == "aé"
    assert bytes(second.finish().ids.tolist()).decode() == "aè"


@pytest.mark.parametrize(
    ("parts", "offset"),
    [([b"ab\xff"], 2), ([b"ab", b"c\xc3", b"("], 3), ([b"x" * 70_000 + b"\xff"], 70_000), ([b"ab\xc3"], 2)],
)
def test_errors_report_the_offset_of_invalid_bytes(parts: list[bytes], offset: int) -> None:
    with pytest.raises(DataError, match=f"at byte offset {offset} "):
        tokenize(ByteTokenizer(), list(parts))


def test_pending_text_is_bounded() -> None:
    incremental = IncrementalTokenizer(ByteTokenizer())
    for _ in range(20):
        for _ in incremental.feed("x" * 50_000):
            assert len(incremental.pending_text) <= 8192
