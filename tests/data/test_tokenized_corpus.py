from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data import tokenize, tokenized_corpus
from memtx.data.books import BookDataModule
from memtx.data.sources.base import CorpusManifest, Document, assign_split
from memtx.data.sources.files import FileSource
from memtx.data.tokenized_corpus import TokenizedCorpus, is_tokenized_corpus, tokenize_corpus
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.errors import CheckpointError, DataError

SHARES = {"validation": 0.2, "test": 0.2, "train": 0.6}


def write_rows(path: Path, count: int = 60) -> Path:
    lines = [
        json.dumps({"text": f"Row {number} is long. " * (number % 7), "key": f"k{number}"}) for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusManifest:
    monkeypatch.setattr(tokenize, "MIN_SHARD_BYTES", 900)
    monkeypatch.setattr("memtx.data.sources.tables.BLOCK_BYTES", 500)
    return FileSource(
        [str(write_rows(tmp_path / "a.jsonl"))], id_column="key", validation_fraction=0.2, test_fraction=0.2
    ).scan()


def test_every_row_is_in_the_split_of_its_id(source: CorpusManifest, tmp_path: Path) -> None:
    outs = [
        tokenize_corpus(tmp_path / f"out{workers}", source, ByteTokenizer(), num_workers=workers) for workers in (1, 2)
    ]
    assert files(outs[0].folder) == files(outs[1].folder)
    assert len(list(outs[0].folder.glob("train/*.bin"))) > 3
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        store = outs[0].open_split(split)
        store.verify()
        for index, name in enumerate(store.ids):
            assert assign_split(name, SHARES) == split
            seen[name] = bytes(store.document_tokens(index)[1:].astype("u1")).decode()
            assert store.num_words[index] == len(seen[name].split())
            assert store.num_bytes[index] == len(seen[name])
    assert seen == {f"k{number}": f"Row {number} is long. " * (number % 7) for number in range(60) if number % 7}
    assert sum(facts["num_skipped"] for facts in outs[0].splits.values()) == 9


@given(st.lists(st.text(max_size=8), max_size=40, unique=True))
def test_a_split_depends_on_the_document_id_alone(names: list[str]) -> None:
    for name in names:
        assert assign_split(name, SHARES) in SHARES
        assert assign_split(name, {"train": 1.0}) == "train"


def test_split_fractions_are_about_as_requested() -> None:
    splits = [assign_split(str(number), SHARES) for number in range(4000)]
    for split, share in SHARES.items():
        # Five standard deviations of a binomial.
        assert abs(splits.count(split) - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_an_existing_folder_is_kept_or_rejected(
    source: CorpusManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    tokenize_corpus(out, source, ByteTokenizer(), num_workers=1)
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(tokenized_corpus, "write_jobs", None)  # calling it would fail
        tokenize_corpus(out, source, ByteTokenizer(), num_workers=1, verify=True)
    with pytest.raises(DataError, match="prepared from other texts, or these have changed"):
        tokenize_corpus(out, source, BytePairTokenizer(300), num_workers=1)
    write_rows(tmp_path / "a.jsonl", 61)
    changed = FileSource(
        [str(tmp_path / "a.jsonl")], id_column="key", validation_fraction=0.2, test_fraction=0.2
    ).scan()
    with pytest.raises(DataError, match="or remove it"):
        tokenize_corpus(out, changed, ByteTokenizer(), num_workers=1)
    assert files(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for other in (tmp_path / "mine", tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match="exists and is no prepared folder"):
            tokenize_corpus(other, source, ByteTokenizer(), num_workers=1)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert files(tokenize_corpus(tmp_path / "empty", source, ByteTokenizer(), num_workers=1).folder) == before


def test_damage_is_reported_and_repaired(
    source: CorpusManifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    tokenize_corpus(out, source, ByteTokenizer(), num_workers=1)
    content = files(out)
    inode = (out / "train" / "shard-00002.bin").stat().st_ino
    for name, message in (
        ("train/shard-00001.bin", "is damaged"),
        ("train/shard-00001.bin.json", "is damaged"),
        ("test/index.json", "is damaged"),
        ("tokenizer.json", "was changed|describes no"),
        ("prepared.json", "no whole prepared folder"),
    ):
        raw = bytearray(content[name])
        # In the middle of the file; prepared.json has no checksum, so damage a key that is read.
        raw[raw.find(b"splits") if name == "prepared.json" else len(raw) // 2] ^= 1
        (out / name).write_bytes(raw)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokenize_corpus(out, source, ByteTokenizer(), num_workers=1, verify=True)
        assert re.search(message, caplog.text), caplog.text
        assert files(out) == content, name
    assert (out / "train" / "shard-00002.bin").stat().st_ino == inode


def test_shards_of_an_earlier_source_are_removed(source: CorpusManifest, tmp_path: Path) -> None:
    fresh = files(tokenize_corpus(tmp_path / "fresh", source, ByteTokenizer(), num_workers=1).folder)
    building = tmp_path / ".out.building"
    for name in ("train/shard-00099.bin", "other/shard-00000.bin.json", "test/.shard.bin.0a.tmp"):
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        (building / name).write_bytes(b"old")
    assert files(tokenize_corpus(tmp_path / "out", source, ByteTokenizer(), num_workers=1).folder) == fresh
    assert not building.exists()


def test_changed_texts_rebuild_their_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MIN_SHARD_BYTES", 10)
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"text {number:02} " * 30)
    (root / "17.txt").write_bytes(b"\xff" * 240)

    def tokenized() -> TokenizedCorpus:
        return tokenize_corpus(tmp_path / "out", FileSource([str(root)]).scan(), ByteTokenizer(), num_workers=1)

    with pytest.raises(DataError, match=r"17\.txt' is not UTF-8"):
        tokenized()
    assert not (tmp_path / "out").exists()
    first = (tmp_path / ".out.building" / "train" / "shard-00000.bin").stat().st_ino
    (root / "17.txt").write_text("text 17 " * 30)
    assert (tokenized().folder / "train" / "shard-00000.bin").stat().st_ino == first


def test_a_tokenizer_is_trained_on_training_texts_alone(source: CorpusManifest, tmp_path: Path) -> None:
    corpus = tokenize_corpus(tmp_path / "out", source, BytePairTokenizer(280), num_workers=1)
    tokenizer = corpus.read_tokenizer()
    assert tokenizer.vocab_size == 280
    texts = tokenized_corpus._training_texts(source, tokenized_corpus.MAX_TRAINING_BYTES)
    sampled = "".join(text for portions in texts for text in portions)
    # Texts of other splits are not used.
    assert "Row 1 " in sampled or assign_split("k1", SHARES) != "train"
    held = next(number for number in range(60) if number % 7 and assign_split(f"k{number}", SHARES) == "test")
    assert f"Row {held} " not in sampled
    again = tokenize_corpus(tmp_path / "again", source, BytePairTokenizer(280), num_workers=1)
    assert files(again.folder) == files(corpus.folder)


def test_training_reads_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "books"
    for split, count in (("train", 5), ("validation", 2)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            (root / split / f"{number}.txt").write_text(f"book {number} of {split} " * 50)
    out = tmp_path / "out"
    tokenize_corpus(out, FileSource([str(root)]).scan(), BytePairTokenizer(270), num_workers=1)
    assert is_tokenized_corpus(out)
    options = {"batch_size": 2, "segment_length": 8, "cache_dir": str(tmp_path / "cache"), "num_workers": 1}
    module = BookDataModule(str(out), **options)  # type: ignore[arg-type]
    plain = BookDataModule(str(root), BytePairTokenizer(270), **options)  # type: ignore[arg-type]
    assert module.vocab_size == 270
    assert not module.has_split("test")
    for _ in range(2):
        batch, other = next(iter(module.train_dataloader())), next(iter(plain.train_dataloader()))
        assert np.array_equal(batch.tokens, other.tokens)
    # So a run that began on the texts continues with the folder.
    assert module.state_dict() == plain.state_dict()
    module.load_state_dict(plain.state_dict())
    BookDataModule(str(out), BytePairTokenizer(270))
    for tokenizer in (BytePairTokenizer(271), ByteTokenizer()):
        with pytest.raises(DataError, match=r"with a BytePairTokenizer of 270 tokens, which is not the \w+ of"):
            BookDataModule(str(out), tokenizer)
    with pytest.raises(DataError, match="no split 'test', it has train, validation"):
        module.token_store("test")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        module.load_state_dict({**plain.state_dict(), "tokenizer": ByteTokenizer().to_json()})
    (out / "prepared.json").write_text("{}")
    with pytest.raises(DataError, match="no whole prepared folder"):
        BookDataModule(str(out))


def test_an_empty_source_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        tokenize_corpus(tmp_path / "out", CorpusManifest("x"), ByteTokenizer())
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document with a word"):
        tokenize_corpus(tmp_path / "out", FileSource([str(tmp_path)]).scan(), ByteTokenizer(), num_workers=1)
    with pytest.raises(DataError, match="no split 'train' to train a tokenizer on"):
        tokenize_corpus(
            tmp_path / "o", CorpusManifest("x", {"test": [Document("a", "a", 1, text="a")]}), BytePairTokenizer(300)
        )
    assert not (tmp_path / "out").exists()
