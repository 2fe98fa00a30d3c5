from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.sources.base import Corpus
from memtx.data.sources.corpus import open_corpus
from memtx.errors import DataError


def book_root(root: Path) -> Path:
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            (root / split / f"{split[0]}{number}.txt").write_bytes(f"Book {number} of {split}.\r\n".encode())
    (root / "metadata.csv").write_text('t1,"A Title, with comma",1900,http://x\n')
    return root


def test_the_layout_of_pg19(tmp_path: Path) -> None:
    corpus = open_corpus(book_root(tmp_path))
    assert [document.id for document in corpus.get_split("train")] == ["t0", "t1", "t2"]
    assert [document.title for document in corpus.get_split("train")] == ["t0", "A Title, with comma", "t2"]
    assert corpus.get_split("test")[1].read() == "Book 1 of test.\r\n"  # newlines as in the file


def joined(corpus: Corpus) -> str:
    return "".join(
        document.read() for split in ("train", "validation", "test") for document in corpus.split_parts[split]
    )


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["a b", "é", "\n", "\n\n", "日本語の文章", "\r\n\r\n", " x"]), min_size=1, max_size=300)
)
def test_one_file_is_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.mktemp("one") / "book.txt"
    path.write_bytes("".join(parts).encode())
    assert joined(open_corpus(path)) == "".join(parts)


def test_one_file_is_cut_at_paragraph_ends(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("A paragraph of some words.\nAnd a line.\n\n" * 500)
    corpus = open_corpus(path)
    texts = [corpus.get_split(name)[0].read() for name in ("train", "validation", "test")]
    assert all(text.startswith("A paragraph") and text.endswith(".\n\n") for text in texts)
    assert len(texts[0]) / sum(map(len, texts)) == pytest.approx(0.9, abs=0.01)  # one paragraph is 0.2 %


def test_a_folder_assigns_whole_documents_by_id(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{number}.md").write_text(f"text {number}")
    (tmp_path / ".hidden.txt").write_text("not this")
    first = open_corpus(tmp_path)
    assert {name: len(documents) for name, documents in first.split_parts.items()} == {
        "train": 36,
        "validation": 2,
        "test": 2,
    }
    ids = [document.id for documents in first.split_parts.values() for document in documents]
    assert sorted(ids) == sorted(f"deep/{number}.md" for number in range(40))
    assert open_corpus(tmp_path) == first


@pytest.mark.parametrize("root", ["embedded", "embedded+sources"])
def test_embedded_is_disjoint_and_repeatable(root: str) -> None:
    corpus = open_corpus(root)
    ids = [document.id for documents in corpus.split_parts.values() for document in documents]
    assert len(ids) == len(set(ids))
    assert all(corpus.get_split(name) for name in ("train", "validation", "test"))
    assert open_corpus(root) == corpus
    for document in corpus.get_split("validation")[:3]:
        assert len(document.read().encode()) == document.size


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing' does not exist.*deepmind-gutenberg.*--data\.root"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(DataError, match="Did you mean 'embedded'"):
        open_corpus("embeded")
    with pytest.raises(DataError, match="holds no text"):
        open_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt' is empty"):
        open_corpus(tmp_path)
    root = book_root(tmp_path / "books")
    with pytest.raises(DataError, match=r"no split 'validate', it has train.* mean 'validation'"):
        open_corpus(root).get_split("validate")
    (root / "train" / "bad.txt").write_bytes(b"good\xff")
    with pytest.raises(DataError, match=r"bad\.txt' is not UTF-8.*offset 4"):
        open_corpus(root).get_split("train")[0].read()
    (root / "test" / "no.txt").touch()
    with pytest.raises(DataError, match=r"no\.txt' is empty"):
        open_corpus(root)
