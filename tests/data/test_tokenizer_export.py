"""Exported tokenizers give the ids of the tokenizer, in the tokenizers library and read back by memtx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.hf_tokenizers import WordPieceTokenizer
from memtx.data.tokenizer_export import PAD_TOKEN, export_tokenizer
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

TEXT = "The whale, the white whale! ÿ Żółw 中文 \U0001f40b\n"


def byte_pair() -> Tokenizer:
    tokenizer = BytePairTokenizer(300)
    tokenizer.train([TEXT * 3])
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "byte pairs": byte_pair()}


def backend_of(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(export_tokenizer(tokenizer).texts["tokenizer.json"])


BACKENDS = {name: backend_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_ids_and_texts_are_the_same(name: str, text: str) -> None:
    tokenizer, backend = TOKENIZERS[name], BACKENDS[name]
    ids = backend.encode(text).ids
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode_chunk(text).tolist()]
    assert backend.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_files_are_read_back(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    exported = export_tokenizer(tokenizer)
    for file, text in exported.texts.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    again = load_tokenizer(tmp_path)
    assert again.bos_token_id == tokenizer.bos_token_id
    assert again.eos_token_ids == frozenset()
    assert again.encode_chunk(TEXT).tolist() == tokenizer.encode_chunk(TEXT).tolist()
    # The padding has an id that no text has, so that it is neither the begin token nor a new id.
    pad = exported.token_ids["pad_token_id"]
    assert tokenizer.token_bytes(pad) == b"\xff"
    assert again.token_bytes(pad) == b""
    assert json.loads(exported.texts["tokenizer_config.json"])["pad_token"] == PAD_TOKEN
    assert exported.excluded_ids == [tokenizer.bos_token_id]
    twice = export_tokenizer(again)
    assert twice.token_ids == exported.token_ids


def test_word_pieces_keep_their_special_tokens() -> None:
    tokenizer = WordPieceTokenizer(200)
    tokenizer.train([TEXT * 3])
    exported = export_tokenizer(tokenizer)
    assert exported.token_ids["pad_token_id"] == tokenizer.pad_token_id
    assert backend_of(tokenizer).encode("the whale").ids[0] == tokenizer.cls_token_id
