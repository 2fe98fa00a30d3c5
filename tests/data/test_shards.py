from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data import shards, tokenize, tokenized_corpus
from memtx.data.shards import TokenStore
from memtx.data.sources.base import Document
from memtx.data.sources.corpus import open_corpus
from memtx.data.tokenize import plan_shards
from memtx.data.tokenized_corpus import open_store
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.errors import DataError, MemtxError

TEXTS = [f"Document {number} says: " + "the whale swims, é. \n\n" * (number * 7 + 1) for number in range(9)]


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [
        Document(f"d{number}", f"Title {number}", len(text.encode()), text=text) for number, text in enumerate(texts)
    ]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MIN_SHARD_BYTES", 500)


def bpe() -> BytePairTokenizer:
    tokenizer = BytePairTokenizer(300)
    tokenizer.train(TEXTS)
    return tokenizer


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_documents_come_back_exactly(tmp_path: Path, workers: int) -> None:
    for tokenizer in (ByteTokenizer(), bpe()):
        store = open_store(documents(), tokenizer, cache_dir=tmp_path, num_workers=workers)
        assert len(list(store.folder.glob("*.bin"))) > 2
        assert store.ids == [f"d{number}" for number in range(9)]
        assert store.titles[3] == "Title 3"
        for index, text in enumerate(TEXTS):
            tokens = store.document_tokens(index)
            assert tokens.dtype == np.uint16
            assert tokens[0] == tokenizer.bos_token_id
            assert np.array_equal(tokens[1:], tokenizer.encode(text))
            assert len(tokens) == store.lengths[index]
            assert (store.num_words[index], store.num_bytes[index]) == (len(text.split()), len(text.encode()))
            assert np.array_equal(store.slice_tokens(index, 2, 9), tokens[2:9])
        store.verify()
        assert store.num_tokens == store.lengths.sum()


def test_a_store_pickles_without_its_tokens(tmp_path: Path) -> None:
    store = open_store(documents(), ByteTokenizer(), cache_dir=tmp_path)
    store.document_tokens(8)
    raw = pickle.dumps(store)
    assert len(raw) < 1000
    assert np.array_equal(pickle.loads(raw).document_tokens(8), store.document_tokens(8))


def test_large_vocabularies_take_four_bytes() -> None:
    assert shards.token_dtype(1 << 16).itemsize == 2
    assert shards.token_dtype((1 << 16) + 1).itemsize == 4


def test_the_store_is_used_again_until_text_or_tokenizer_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.txt").write_text("some words " * 200)
    cache = tmp_path / "cache"

    def opened() -> TokenStore:
        return open_store(open_corpus(root).get_split("train"), ByteTokenizer(), cache_dir=cache, num_workers=1)

    first = opened()
    with monkeypatch.context() as patch:
        patch.setattr(tokenized_corpus, "write_jobs", None)  # calling it would fail
        assert opened().fingerprint == first.fingerprint
    (root / "1.txt").write_text("other words " * 200)
    changed = opened()
    assert changed.fingerprint != first.fingerprint
    assert changed.document_tokens(1).tobytes() != first.document_tokens(1).tobytes()
    assert open_store(documents(), bpe(), cache_dir=cache).fingerprint not in (first.fingerprint, changed.fingerprint)
    # The same text with another time is encoded again, to the same tokens.
    os.utime(root / "1.txt", ns=(1, 1))
    assert opened().fingerprint == changed.fingerprint


@pytest.mark.usefixtures("small_shards")
def test_damage_is_found_and_only_the_damaged_shard_is_rebuilt(tmp_path: Path) -> None:
    store = open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1)
    fingerprint = store.fingerprint
    bad, good = store.folder / "shard-00001.bin", store.folder / "shard-00000.bin"
    content, inode = bad.read_bytes(), good.stat().st_ino
    bad.write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"shard-00001.bin' has {len(content) - 2} bytes, expected {len(content)}"):
        TokenStore(store.folder)
    assert open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1).fingerprint == fingerprint
    assert bad.read_bytes() == content
    bad.write_bytes(content[:-2] + b"\x01\x00")
    with pytest.raises(DataError, match=r"shard-00001\.bin' is damaged"):
        TokenStore(store.folder).verify()
    open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1, verify=True).verify()
    assert bad.read_bytes() == content
    assert good.stat().st_ino == inode
    (store.folder / "index.json").write_text("{")
    assert open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1).fingerprint == fingerprint


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_run_keeps_its_complete_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tokenize.write_job
    written: list[int] = []

    def interrupted(job: tokenize.ShardJob, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.shard_index)
        original(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize, "write_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1)
    assert not list(tmp_path.glob("tokens-*"))
    again: list[int] = []

    def counted(job: tokenize.ShardJob, *rest: object) -> None:
        again.append(job.shard_index)
        original(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize, "write_job", counted)
    store = open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=1)
    assert again
    assert not set(again) & set(written)
    store.verify()
    fresh = open_store(documents(), ByteTokenizer(), cache_dir=tmp_path / "fresh", num_workers=1)
    assert fresh.fingerprint == store.fingerprint


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_shards")
def test_a_bad_text_is_named(tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    bad = Document("bad", "bad", 4, str(tmp_path / "bad.txt"))
    with pytest.raises(DataError, match=r"bad\.txt' is not UTF-8.*offset 3"):
        open_store([*documents(), bad], ByteTokenizer(), cache_dir=tmp_path, num_workers=workers)
    with pytest.raises(DataError, match="'d1' has no words"):
        open_store(documents(["words", " \n"]), ByteTokenizer(), cache_dir=tmp_path, num_workers=workers)


@pytest.mark.usefixtures("small_shards")
def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.Popen

    def dying(_: list[str], **options: Any) -> subprocess.Popen[str]:
        return original([sys.executable, "-c", "raise SystemExit(9)"], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    with pytest.raises(DataError, match=r"ended with code -?9.*fewer workers"):
        open_store(documents(), ByteTokenizer(), cache_dir=tmp_path, num_workers=2)


def test_workers_start_without_torch() -> None:
    code = "import sys, memtx.data.tokenize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_mistakes_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        open_store([], ByteTokenizer(), cache_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(MemtxError, match=r"cannot be written to.*--data\.cache_dir"):
        open_store(documents(), ByteTokenizer(), cache_dir=tmp_path / "file")
    store = open_store(documents(), ByteTokenizer(), cache_dir=tmp_path)
    index = json.loads((store.folder / "index.json").read_text())
    (store.folder / "index.json").write_text(json.dumps({**index, "version": 7}))
    with pytest.raises(DataError, match="version 7"):
        TokenStore(store.folder)


@given(st.lists(st.integers(1, 200 << 20), min_size=1, max_size=60))
def test_every_document_is_in_one_shard_of_bounded_size(sizes: list[int]) -> None:
    plan = plan_shards(sizes)
    assert [index for shard in plan for index in shard] == list(range(len(sizes)))
    assert all(len(shard) == 1 or sum(sizes[index] for index in shard) <= tokenize.MAX_SHARD_BYTES for shard in plan)
