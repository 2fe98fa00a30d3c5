"""Ids and texts of streamed encoding and decoding are those of the library, for tokenizers of every kind."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from memtx.data import safe_cuts
from memtx.data.tokenizers import BytePairTokenizer
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
