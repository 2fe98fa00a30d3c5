from __future__ import annotations

import json
from pathlib import Path

import pytest

from memtx.data.books import BookDataModule
from memtx.data.sources.hub import HubDataset
from memtx.data.tokenized_corpus import tokenize_corpus
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "set"
    root.mkdir()
    for number in range(3):
        records = [{"text": f"train {number} row {row}", "key": f"{number}.{row}"} for row in range(5)]
        (root / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (root / "test-0.jsonl").write_text(json.dumps({"text": "one test", "key": "t"}) + "\n")
    return root


def test_a_dataset_is_tokenized_shard_by_shard(folder: Path, tmp_path: Path) -> None:
    source = HubDataset(str(folder)).scan()
    assert [len(source.split_parts[split]) for split in ("train", "test")] == [3, 1]
    for workers in (1, 2):
        corpus = tokenize_corpus(tmp_path / f"out{workers}", source, ByteTokenizer(), num_workers=workers)
        store = corpus.open_split("train")
        decoded = [bytes(store.document_tokens(index)[1:].astype("u1")).decode() for index in range(len(store))]
        assert decoded == [f"train {number} row {row}" for number in range(3) for row in range(5)]
        assert store.ids[6] == f"{folder}/train-1@1"
    assert HubDataset(str(folder), id_column="key").scan().split_parts["train"][0].cache_key


def test_training_reads_a_dataset_by_class_path(folder: Path, tmp_path: Path) -> None:
    module = BookDataModule(
        source=HubDataset(str(folder), validation_fraction=0.5, test_fraction=0),
        cache_dir=str(tmp_path / "c"),
        num_workers=1,
    )
    module.prepare_data()
    assert module.has_split("train")
    assert module.has_split("validation")
    assert not module.has_split("test")
    assert len(module.token_store("train")) + len(module.token_store("validation")) == 15


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'txt', it has text, key"):
        HubDataset(str(folder), text_column="txt").scan()
    with pytest.raises(DataError, match="could not be read: "):
        HubDataset(str(tmp_path / "nowhere")).scan()
    (folder / "train-1.jsonl").write_text("{")
    source = HubDataset(str(folder)).scan()
    with pytest.raises(DataError, match="could not be read: "):
        tokenize_corpus(tmp_path / "out", source, ByteTokenizer(), num_workers=1)
