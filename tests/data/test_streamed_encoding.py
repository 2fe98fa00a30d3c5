"""Ids and texts of streamed encoding and decoding are those of the library, for tokenizers of every kind."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend

from memtx.data import safe_cuts
from memtx.data.tokenizers import BytePairTokenizer
from memtx.errors import DataError
from tests.data.tokenizer_zoo import ADDED_SPELLINGS, CORPUS, LOSSY, NAMES, PARAGRAPHS, backend_json

WORDS = [*CORPUS.split(" ")[:400], *PARAGRAPHS, "\u2581", "zq\u0301", "\u200b", "\x00", "\u2028", "x" * 50, "123456"]
SPACES = [" "] * 12 + ["", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\n" * 5, " " * 9]


@functools.cache
def load(name: str) -> tuple[BytePairTokenizer, Any]:
    tokenizer = BytePairTokenizer.from_backend_json(backend_json(name), 0)
    backend = Backend.from_str(backend_json(name))
    backend.encode_special_tokens = True
    return tokenizer, backend


def random_text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    parts = [*WORDS, *ADDED_SPELLINGS * 12]
    return "".join(draw.choice(SPACES) + draw.choice(parts) for _ in range(words)) + draw.choice(SPACES)


def portions(text: str, seed: int) -> list[str]:
    draw, start, parts = random.Random(seed), 0, []
    while start < len(text):
        size = draw.choice([1, 2, 7, 100, 1000])
        parts.append(text[start : start + size])
        start += size
    return parts


# Tokens that strip the spaces beside them lose these.
LOSSLESS = [name for name in NAMES if name not in LOSSY and not name.endswith("+added")]
CONTINUED = [("It was the", " best of"), ("It was the be", "st of"), ("one\n", "two"), ("\u6211", "\u3002")]


def stream(tokenizer: BytePairTokenizer, parts: list[str], **options: bool) -> tuple[list[int], list[bytes]]:
    encoder = tokenizer.encoder(**options)
    chunks = [chunk for part in parts for chunk in encoder.feed(part)] + encoder.flush()
    ids = [token for chunk in chunks for token in chunk.ids.tolist()]
    return ids, [content for chunk in chunks for content in tokenizer.align(chunk)]


@pytest.fixture(params=[30, 2048])
def chunk_chars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(safe_cuts, "MIN_CHUNK_CHARS", request.param)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_streamed_ids_are_those_of_the_whole_text(name: str, chunk_chars: int) -> None:
    tokenizer, backend = load(name)
    for seed in range(40 if chunk_chars == 30 else 2):
        text = random_text(seed, 60 if chunk_chars == 30 else 1500)
        expected = backend.encode(text, add_special_tokens=False).ids
        ids, contents = stream(tokenizer, portions(text, seed))
        assert ids == expected
        assert b"".join(contents) == text.encode()
        assert tokenizer.decode(ids) == backend.decode(expected, skip_special_tokens=True)


def test_texts_are_cut(chunk_chars: int) -> None:
    for name in NAMES:
        encoder = load(name)[0].encoder()
        assert len(encoder.feed(CORPUS)) > len(CORPUS) // (20 * chunk_chars), name


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_any_ids_are_decoded_token_by_token(name: str, seed: int) -> None:
    tokenizer, backend = load(name)
    draw = random.Random(seed)
    # Byte tokens more often than others, so that characters are made of them, wrong ones too.
    ids = [draw.randrange(min(tokenizer.vocab_size, draw.choice([300, 9999]))) for _ in range(draw.randrange(25))]
    decoder = tokenizer.decoder()
    text = "".join([*map(decoder.feed, ids), decoder.finish()])
    assert text == backend.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_tokenizers_give_back_the_text(name: str) -> None:
    tokenizer, _ = load(name)
    for text in (CORPUS[:3000], random_text(5).replace("\u2581", ""), " leading and trailing "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert b"".join(tokenizer.token_contents(tokenizer.encode(text).tolist(), continues=False)) == text.encode()


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_text_that_continues_another_gets_no_space(name: str) -> None:
    tokenizer, _ = load(name)
    for before, after in CONTINUED:
        ids, _ = stream(tokenizer, [after], continues=True)
        assert tokenizer.decode([*tokenizer.encode(before), *ids]) == before + after


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("+added")])
def test_special_tokens_are_text_unless_parsed(name: str) -> None:
    tokenizer, _ = load(name)
    backend = Backend.from_str(backend_json(name))
    special = backend.token_to_id("<|im_end|>")
    text = "user asks<|im_end|>\nIt was the best of <|im_end|> times " * 60
    assert special not in tokenizer.encode(text)
    assert tokenizer.encode(text, parse_special=True).tolist() == backend.encode(text, add_special_tokens=False).ids
    ids, contents = stream(tokenizer, portions(text, 1), parse_special=True)
    assert ids.count(special) == 120
    assert b"".join(contents) == text.encode()
    spelled = [content for token, content in zip(ids, contents, strict=True) if token == special]
    assert {content.strip() for content in spelled} == {b"<|im_end|>"}


def test_stored_options_change_no_ids() -> None:
    for name in ("llama3", "t5", "bert"):
        backend = Backend.from_str(backend_json(name))
        expected = backend.encode(CORPUS, add_special_tokens=False).ids
        backend.enable_truncation(4)
        backend.enable_padding(length=9000)
        if name == "llama3":
            backend.model.dropout = 0.5
        assert BytePairTokenizer.from_backend_json(backend.to_str(), 0).encode(CORPUS).tolist() == expected


def test_a_tokenizer_whose_ids_depend_on_the_whole_text_is_refused() -> None:
    backend = Backend.from_str(backend_json("t5"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    with pytest.raises(DataError, match="cannot be encoded in parts"):
        BytePairTokenizer.from_backend_json(backend.to_str(), 0)
    backend = Backend.from_str(backend_json("llama3"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,10}"), "isolated")
    with pytest.raises(DataError, match="cannot be encoded in parts"):
        BytePairTokenizer.from_backend_json(backend.to_str(), 0)
    backend = Backend.from_str(backend_json("metaspace-never"))
    backend.pre_tokenizer = pre_tokenizers.Punctuation("merged_with_previous")
    with pytest.raises(DataError, match="cannot be encoded in parts"):
        BytePairTokenizer.from_backend_json(backend.to_str(), 0)
    backend = Backend.from_str(backend_json("llama3"))
    backend.decoder = decoders.CTC()
    with pytest.raises(DataError, match=r"decoder \(CTC\)"):
        BytePairTokenizer.from_backend_json(backend.to_str(), 0)
