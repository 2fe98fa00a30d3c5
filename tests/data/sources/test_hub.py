from __future__ import annotations

import json
from pathlib import Path

import pytest

from memtx.data.books import BookDataModule
from memtx.data.prepared import prepare
from memtx.data.sources.hub import HubDataset
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
        rows = [{"text": f"train {number} row {row}", "key": f"{number}.{row}"} for row in range(5)]
        (root / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "test-0.jsonl").write_text(json.dumps({"text": "one test", "key": "t"}) + "\n")
    return root


def test_a_data_set_is_prepared_piece_by_piece(folder: Path, tmp_path: Path) -> None:
    source = HubDataset(str(folder)).source()
    assert [len(source.laid_out[split]) for split in ("train", "test")] == [3, 1]
    for workers in (1, 2):
        found = prepare(tmp_path / f"out{workers}", source, ByteTokenizer(), workers=workers)
        store = found.store("train")
        said = [bytes(store.document(place)[1:].astype("u1")).decode() for place in range(len(store))]
        assert said == [f"train {number} row {row}" for number in range(3) for row in range(5)]
        assert store.ids[6] == f"{folder}/train-1@1"
    assert HubDataset(str(folder), id_field="key").source().laid_out["train"][0].stamp


def test_training_reads_it_by_its_class_path(folder: Path, tmp_path: Path) -> None:
    module = BookDataModule(texts=HubDataset(str(folder), validation=0.5, test=0), cache=str(tmp_path / "c"), workers=1)
    module.prepare_data()
    assert module.has("train")
    assert module.has("validation")
    assert not module.has("test")
    assert len(module.store("train")) + len(module.store("validation")) == 15


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'txt', it has text, key"):
        HubDataset(str(folder), field="txt").source()
    with pytest.raises(DataError, match="could not be read: "):
        HubDataset(str(tmp_path / "nowhere")).source()
    (folder / "train-1.jsonl").write_text("{")
    source = HubDataset(str(folder)).source()
    with pytest.raises(DataError, match="could not be read: "):
        prepare(tmp_path / "out", source, ByteTokenizer(), workers=1)
