"""Names of splits, by one table for every kind of file and every entry."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from memtx.data.books import BookDataModule
from memtx.data.sources.base import SPLITS
from memtx.data.sources.corpus import open_corpus
from memtx.data.sources.files import FileSource
from memtx.data.sources.splits import infer_splits
from memtx.errors import DataError

LAYOUTS = [
    ["train.txt", "valid.txt", "test.txt"],
    ["train.txt", "val.txt", "test.txt"],
    ["TRAIN.TXT", "DEV.TXT", "TEST.TXT"],
    ["training.md", "evaluation.md", "testing.md"],
    ["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"],
    ["wikitext-103/wiki.train.raw", "wikitext-103/wiki.valid.raw", "wikitext-103/wiki.test.raw"],
    ["train.txt.raw", "valid.txt.raw", "test.txt.raw"],
    ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"],
    ["qa1_x_train.txt", "qa1_x_valid.txt", "qa1_x_test.txt"],
    ["train-00000-of-00003.txt", "dev-00000-of-00001.txt", "test-00000-of-00001-a09b74b3ef9c3b56.txt"],
    ["train/a.txt", "validation/a.txt", "test/a.txt"],
    ["train/a.txt", "valid/a.txt", "test/a.txt"],
    ["train/a.txt", "val/deep/a.txt", "test/a.txt"],
    ["data/train/a.txt", "data/dev/a.txt", "data/test/a.txt"],
    ["en/train/test.txt", "en/eval/train.txt", "en/test/dev.txt"],  # folders before files
    ["corpus.txt", "valid.txt", "test.txt"],  # what is in no split is trained on if nothing is named train
    ["books-train/a.txt", "books-valid/a.txt", "books-test/a.txt"],
    ["trainset.txt", "devset.txt", "testset.txt"],
    ["trainData/a.txt", "valData/a.txt", "testData/a.txt"],
]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def read(root: str, source: str) -> dict[str, str]:
    manifest = open_corpus(root) if source == "open_corpus" else FileSource([root]).scan()
    assert not manifest.unsplit_parts
    return {
        split: "".join(document.read() for part in parts for document in part.iter_documents())
        for split, parts in manifest.split_parts.items()
        if parts
    }


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_names_of_texts_give_the_splits(names: list[str], ending: str, tmp_path: Path) -> None:
    expected = {}
    for split, name in zip(SPLITS, names, strict=True):
        expected[split] = f"Words to {split} on.\n\n" * 20
        write(tmp_path / f"{name}{ending}", COMPRESSIONS[ending](expected[split].encode()))
    assert read(str(tmp_path), "open_corpus") == expected
    assert read(str(tmp_path), "FileSource") == expected


@pytest.mark.parametrize("names", LAYOUTS[4:-4], ids=lambda names: names[0])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_names_of_tables_give_the_splits(names: list[str], ending: str, tmp_path: Path) -> None:
    for split, name in zip(SPLITS, names, strict=True):
        record = json.dumps({"text": f"Words of {split}."})
        raw = (f"id,text\n1,Words of {split}.\n" if ending == ".csv" else record + "\n").encode()
        stem = name.replace(".txt", "").replace(".tokens", "").replace(".raw", "")
        write(tmp_path / f"{stem}{ending}", gzip.compress(raw) if ending.endswith(".gz") else raw)
    assert read(str(tmp_path), "FileSource") == {split: f"Words of {split}." for split in SPLITS}
    with pytest.raises(DataError, match=r"holds tables of texts.*memtx prepare"):
        open_corpus(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["constrain.txt", "testament.txt", "valley.txt", "developer.txt"],
        ["the-acid-test.txt", "moby-dick.txt"],
        ["how-to-train.txt", "latest.txt"],
        ["train-test.txt", "a.txt"],
    ],
)
def test_other_words_are_no_splits(names: list[str]) -> None:
    assert infer_splits(names) == [None] * len(names)


def test_names_of_one_shape_are_of_one_layout() -> None:
    # The shards of the command `split`, and languages.
    names = ["x-train-aa.txt", "x-train-ab.txt", "x-valid-aa.txt", "de-train-ac.txt", "the-acid-test.txt"]
    assert infer_splits(names) == ["train", "train", "validation", "train", None]


def test_both_a_file_and_a_folder_of_a_split(tmp_path: Path) -> None:
    for name in ("train.txt", "train/train.txt", "train/b/x.txt", "train/a/x.txt", "valid.txt"):
        write(tmp_path / name, f"Words of {name}.".encode())
    corpus = open_corpus(tmp_path)
    ids = [document.id for document in corpus.get_split("train")]
    assert sorted(ids) == ["train.txt", "train/a/x.txt", "train/b/x.txt", "train/train.txt"]
    assert corpus.splits == ("train", "validation")


def test_a_folder_with_test_texts_only_trains_on_none(tmp_path: Path) -> None:
    write(tmp_path / "a" / "test.txt", b"Words.")
    assert open_corpus(tmp_path / "a").splits == ("test",)
    module = BookDataModule(str(tmp_path / "a"), cache_dir=str(tmp_path / "cache"), num_workers=1)
    with pytest.raises(DataError, match="no split 'train', it has test"):
        module.train_dataloader()


def test_one_file_is_cut_whatever_its_name_and_compression(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number} of some words.\n\n" for number in range(1000))
    expected = None
    for name in ("train.txt", "book", "test.md"):
        for ending, compress in COMPRESSIONS.items():
            write(tmp_path / name / f"{name}{ending}", compress(text.encode()))
            path = str(tmp_path / name / f"{name}{ending}")
            splits = read(path, "open_corpus")
            assert "".join(splits.values()) == text
            assert all(part.startswith("Paragraph ") for part in splits.values())
            assert len(splits["train"]) / len(text) == pytest.approx(0.9, abs=0.01)  # a paragraph is 0.1 %
            assert splits == read(path, "FileSource")
            assert expected in (None, splits)
            expected = splits
            (note,) = open_corpus(path).notes
            assert "each document is cut to splits (0.9 train, 0.05 validation, 0.05 test)" in note


def test_given_fractions_cut_few_texts(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number} of some words.\n\n" for number in range(1000))
    write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))
    for root in (tmp_path / "a.txt.gz", tmp_path):
        manifest = FileSource([str(root)], validation_fraction=0.25, test_fraction=0).scan()
        sizes = {split: sum(part.size for part in parts) for split, parts in manifest.split_parts.items()}
        assert sizes["validation"] / len(text) == pytest.approx(0.25, abs=0.01)  # a paragraph is 0.1 %
        assert sum(sizes.values()) == len(text)
    write(tmp_path / "rows.jsonl", b"".join(json.dumps({"text": text}).encode() + b"\n" for _ in range(3)))
    manifest = FileSource([str(tmp_path / "rows.jsonl")]).scan()
    assert [len(manifest.split_parts[split]) for split in SPLITS] == [3, 3, 3]


def test_a_text_without_words_for_each_split_is_not_cut(tmp_path: Path) -> None:
    for name, raw in (("short.txt", b"Hi."), ("blank.txt", b"Some words." + b"\n" * 500)):
        write(tmp_path / name, raw)
    corpus = open_corpus(tmp_path)
    assert {split: [document.id for document in corpus.split_parts[split]] for split in corpus.splits} == {
        "train": ["blank.txt", "short.txt"]
    }
    assert corpus.notes == [
        f"'{tmp_path}': all texts are for training, because they are too short to be cut into splits."
    ]
