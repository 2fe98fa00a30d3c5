from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import fsspec
import pytest

from memtx.data.sources.base import CorpusManifest
from memtx.data.sources.corpus import open_corpus
from memtx.data.sources.files import NO_SPLIT, README, FileSource
from memtx.data.sources.listing import HIDDEN
from memtx.errors import DataError


def texts(source: CorpusManifest) -> dict[str, dict[str, str]]:
    """Return all texts by split and name, as a writer would read them."""
    texts_by_split: dict[str, dict[str, str]] = {}
    for split in source.split_parts:
        for part in source.split_parts[split]:
            texts_by_split.setdefault(split, {}).update(
                {document.id: document.read() for document in part.iter_documents()}
            )
    for part in source.unsplit_parts:
        texts_by_split.setdefault("mixed", {}).update(
            {document.id: document.read() for document in part.iter_documents()}
        )
    return texts_by_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, number in (("train", 1), ("train", 2), ("validation", 3), ("test", 4)):
        (tmp_path / "books" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / split / f"{number}.txt").write_text(f"Book {number} of {split}.\r\nIt ends, é.\n")
    (tmp_path / "books" / "metadata.csv").write_text('1,"Moby, a Whale",1851,x\n')
    return tmp_path / "books"


def test_a_local_folder_has_the_splits_of_training(root: Path) -> None:
    source = FileSource([str(root)]).scan()
    assert source.split_parts == open_corpus(root).split_parts
    assert source.splits == ("train", "validation", "test")


def test_the_same_books_from_anywhere(root: Path, tmp_path: Path) -> None:
    expected = texts(FileSource([str(root)]).scan())
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "books.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in root.rglob("*.*"):
            name = path.relative_to(root).as_posix()
            archive.write(path, name)
            memory.pipe(f"/prepared-test/{name}", path.read_bytes())
            packed = tmp_path / "packed" / f"{name}.gz"
            packed.parent.mkdir(parents=True, exist_ok=True)
            packed.write_bytes(gzip.compress(path.read_bytes()))
    for path in (
        f"file://{root}",
        "memory://prepared-test",
        str(tmp_path / "books.zip"),
        f"zip://::{tmp_path / 'books.zip'}",
        f"zip://::file://{tmp_path / 'books.zip'}",
        str(tmp_path / "packed"),
        f"{root}/*/*.txt",
    ):
        source = FileSource([path]).scan()
        assert texts(source) == expected, path
        is_process_local = {part.is_process_local for part, _ in source.iter_parts()}
        assert is_process_local == {path.startswith("memory")}, path
    (book,) = [
        part for part in FileSource([f"file://{root}"]).scan().split_parts["train"] if part.cache_key.startswith("1:")
    ]
    assert next(iter(book.iter_documents())).title == "Moby, a Whale"


def test_explicit_fractions_override_the_layout(root: Path) -> None:
    source = FileSource([str(root)], validation_fraction=0.2, test_fraction=0).scan()
    assert source.splits == ("train", "validation")  # each of the three documents is cut
    assert set(texts(source)["train"]) == {"train/1.txt", "train/2.txt", "validation/3.txt"}
    assert source.left_out == {"splits with fraction 0": ["test"]}
    assert "as its fractions say" in source.notes[1]
    # A fraction for a split that the layout lacks is taken from the training texts alone.
    (root / "validation" / "3.txt").unlink()
    source = FileSource([str(root)], validation_fraction=0.2).scan()
    assert set(texts(source)["test"]) == {"test/4.txt"}
    assert set(texts(source)["validation"]) == {"train/1.txt", "train/2.txt"}


def test_table_names_set_the_split(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train.1.jsonl", "dev_0.jsonl", "deep/test/0.jsonl", "other.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("No text to train on.")
    (tmp_path / ".hidden.jsonl").write_text("no json")
    source = FileSource([str(tmp_path)]).scan()
    assert {reason: len(paths) for reason, paths in source.left_out.items()} == {HIDDEN: 1, README: 1, NO_SPLIT: 1}
    sorted_texts = {split: sorted(split_texts.values()) for split, split_texts in texts(source).items()}
    assert sorted_texts == {
        "train": ["train-0.jsonl", "train.1.jsonl"],
        "validation": ["dev_0.jsonl"],
        "test": ["deep/test/0.jsonl"],
    }


def test_several_paths_are_one_source(root: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("More.")
    # The folder is named train, and a file given by name is not left out.
    source = FileSource([str(root / "train"), str(tmp_path / "more.txt")]).scan()
    assert {split: set(split_texts) for split, split_texts in texts(source).items()} == {"train": {"1", "2", "more"}}
    (tmp_path / "a.jsonl").write_text('{"text": "A row of some words."}\n')
    source = FileSource([str(tmp_path / "a.jsonl"), str(tmp_path / "more.txt")]).scan()
    assert set(texts(source)["train"]) == {"a.jsonl@0", "more.txt"}
    paths = [str(root / split) for split in ("train", "validation", "test")]
    assert texts(FileSource(paths).scan()) == texts(FileSource([str(root)]).scan())
    patterns = [f"{path}/*.txt" for path in paths]
    assert texts(FileSource(patterns).scan()) == texts(FileSource([str(root)]).scan())


def test_mistakes(tmp_path: Path) -> None:
    for paths, message in (
        ([], "No source"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "none*")], "holds no file"),
        (["nosuch://x"], r"'nosuch://x' could not be listed: ValueError: Protocol not known: nosuch"),
        (["s3://bucket/x"], "could not be listed: ImportError: .*s3fs"),
    ):
        with pytest.raises(DataError, match=message):
            FileSource(paths).scan()
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no text, expected files ending in \.txt"):
        FileSource([f"file://{tmp_path}"]).scan()
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl' is empty"):
        FileSource([str(tmp_path)]).scan()
    for shares in (
        {"validation_fraction": -0.1},
        {"test_fraction": 1.0},
        {"test_fraction": 0.6, "validation_fraction": 0.5},
    ):
        with pytest.raises(DataError, match="share"):
            FileSource(["x"], **shares)  # type: ignore[arg-type]
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"word " * 5000)[:-20])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"cut\.txt\.gz' could not be read: EOFError"):
        FileSource([str(tmp_path)]).scan()
