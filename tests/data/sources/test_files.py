from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import fsspec
import pytest

from memtx.data.documents import open_corpus
from memtx.data.source import Source
from memtx.data.sources.files import Files
from memtx.errors import DataError


def texts(source: Source) -> dict[str, dict[str, str]]:
    """Return all texts by split and name, as a writer would read them."""
    found: dict[str, dict[str, str]] = {}
    for split in source.laid_out:
        for part in source.laid_out[split]:
            found.setdefault(split, {}).update({one.id: one.read() for one in part.documents()})
    for part in source.mixed:
        found.setdefault("mixed", {}).update({one.id: one.read() for one in part.documents()})
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, number in (("train", 1), ("train", 2), ("validation", 3), ("test", 4)):
        (tmp_path / "books" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / split / f"{number}.txt").write_text(f"Book {number} of {split}.\r\nIt ends, é.\n")
    (tmp_path / "books" / "metadata.csv").write_text('1,"Moby, a Whale",1851,x\n')
    return tmp_path / "books"


def test_a_local_folder_is_what_training_makes_of_it(root: Path) -> None:
    source = Files([str(root)]).source()
    assert source.laid_out == open_corpus(root).splits
    assert source.splits == ("train", "validation", "test")


def test_the_same_books_from_anywhere(root: Path, tmp_path: Path) -> None:
    expected = texts(Files([str(root)]).source())
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "books.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in root.rglob("*.*"):
            name = path.relative_to(root).as_posix()
            archive.write(path, name)
            memory.pipe(f"/prepared-test/{name}", path.read_bytes())
            packed = tmp_path / "packed" / f"{name}.gz"
            packed.parent.mkdir(parents=True, exist_ok=True)
            packed.write_bytes(gzip.compress(path.read_bytes()))
    for place in (
        f"file://{root}",
        "memory://prepared-test",
        str(tmp_path / "books.zip"),
        f"zip://::{tmp_path / 'books.zip'}",
        f"zip://::file://{tmp_path / 'books.zip'}",
        str(tmp_path / "packed"),
        f"{root}/*/*.txt",
    ):
        source = Files([place]).source()
        assert texts(source) == expected, place
        here = {part.here for part, _ in source.parts()}
        assert here == {place.startswith("memory")}, place
    (book,) = [one for one in Files([f"file://{root}"]).source().laid_out["train"] if one.stamp.startswith("1:")]
    assert next(iter(book.documents())).title == "Moby, a Whale"


def test_stated_shares_go_before_the_layout(root: Path) -> None:
    source = Files([str(root)], validation=0.2, test=0).source()
    assert not source.laid_out
    assert source.shares == {"validation": 0.2, "train": 0.8}
    assert sorted(texts(source)["mixed"]) == ["test/4.txt", "train/1.txt", "train/2.txt", "validation/3.txt"]


def test_tables_are_in_the_split_that_their_name_says(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train.1.jsonl", "dev_0.jsonl", "deep/test/0.jsonl", "testing.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("No text to train on.")
    (tmp_path / ".hidden.jsonl").write_text("no json")
    found = {split: sorted(own.values()) for split, own in texts(Files([str(tmp_path)]).source()).items()}
    assert found == {
        "train": ["train-0.jsonl", "train.1.jsonl"],
        "validation": ["dev_0.jsonl"],
        "test": ["deep/test/0.jsonl"],
    }


def test_several_places_are_one_source(root: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("More.")
    source = Files([str(root / "train"), str(tmp_path / "more.txt")]).source()
    assert sorted(texts(source)["mixed"]) == ["1.txt", "2.txt", "more.txt"]
    (tmp_path / "a.jsonl").write_text('{"text": "A row."}\n')
    source = Files([str(tmp_path / "a.jsonl"), str(root / "train")]).source()
    assert sorted(texts(source)["mixed"]) == ["1.txt", "2.txt", "a.jsonl@0"]


def test_mistakes(tmp_path: Path) -> None:
    for places, said in (
        ([], "No source"),
        ([str(tmp_path / "none")], "holds no file"),
        ([str(tmp_path / "none*")], "holds no file"),
        (["nosuch://x"], r"'nosuch://x' could not be listed: ValueError: Protocol not known: nosuch"),
        (["s3://bucket/x"], "could not be listed: ImportError: .*s3fs"),
    ):
        with pytest.raises(DataError, match=said):
            Files(places).source()
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no text, expected files ending in \.txt"):
        Files([f"file://{tmp_path}"]).source()
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jsonl' is empty"):
        Files([str(tmp_path)]).source()
    for shares in ({"validation": -0.1}, {"test": 1.0}, {"test": 0.6, "validation": 0.5}):
        with pytest.raises(DataError, match="share"):
            Files(["x"], **shares)  # type: ignore[arg-type]
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"word " * 5000)[:-20])
    (tmp_path / "a.jsonl").unlink()
    (part,) = Files([str(tmp_path)]).source().mixed
    with pytest.raises(DataError, match=r"cut\.txt\.gz' could not be read: EOFError"):
        next(iter(part.documents())).read()
