"""Any folder: every byte of it is in exactly one split, or its file is named as not read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.sources.base import CorpusManifest, Document
from memtx.data.sources.corpus import open_corpus
from memtx.data.sources.files import FileSource
from memtx.data.sources.listing import BROKEN_LINK, COMPRESSED_COPY, HIDDEN, READ_ALREADY, SPECIAL, list_files
from memtx.data.tokenized_corpus import tokenize_corpus, train_tokenizer
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.errors import DataError, MemtxError

FOLDERS = ["", "train", "Valid", "data/dev", "test", "deep/er", "x [1]", "a*b?", "ünï çode", ".hidden", "__MACOSX"]
STEMS = ["train", "valid", "TEST", "book", "constrain", "testament", "wiki.train", "wiki.test", "a[b]*?", "README"]
STEMS += ["train-00000-of-00002", "LICENSE", ".DS_Store", "metadata", "two words", "日本"]
TEXT_ENDINGS = [".txt", ".TXT", ".md", ".tokens", ".txt.raw", ".pdf", ""]
TABLE_ENDINGS = [".jsonl", ".json", ".csv", ".tsv"]
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENCODINGS = ["utf-8"] * 12 + ["utf-8-sig", "crlf", "empty", "blank", "nul", "utf-16", "utf-16-le", "gb18030", "latin1"]
REFUSED = {"empty", "blank", "nul", "utf-16", "utf-16-le", "gb18030", "latin1"}

FIRST_MARK = 0x4E00

FILES = st.tuples(
    st.sampled_from(FOLDERS),
    st.sampled_from(STEMS),
    st.sampled_from(TEXT_ENDINGS * 4 + TABLE_ENDINGS),
    st.sampled_from(["", "", "", *COMPRESSIONS]),
    st.sampled_from(ENCODINGS),
    st.integers(1, 60),
)
LINKS = st.tuples(
    st.sampled_from(FOLDERS), st.sampled_from(STEMS), st.sampled_from(["file", "folder", "up", "nowhere"])
)


def encode(text: str, encoding: str) -> bytes:
    if encoding in ("empty", "blank"):
        return b"" if encoding == "empty" else b" \n \n"
    if encoding in ("nul", "crlf"):
        return (f"{text}\0" if encoding == "nul" else text.replace("\n", "\r\n")).encode()
    return text.encode(encoding)


def draw_folder(root: Path, files: list[Any], links: list[Any]) -> tuple[dict[str, str], set[str]]:
    """Write files and links; return the text of each real path, and the paths that are refused when they are read."""
    texts: dict[str, str] = {}
    refused: set[str] = set()
    for index, (folder, stem, ending, compression, encoding, length) in enumerate(files):
        path = root / folder / f"{stem}{ending}{compression}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = chr(FIRST_MARK + index)  # every word of a text is made of its own letter
        text = f"{mark}{mark} {mark}\n\n" * length
        if ending in TABLE_ENDINGS:
            row = {".jsonl": json.dumps({"text": text}), ".json": json.dumps([{"text": text}], indent=1)}
            separator = "\t" if ending == ".tsv" else ","
            content = row.get(ending, f'id{separator}text\n1{separator}"{text}"\n')
            encoding = encoding if encoding in ("empty", "utf-8-sig") else "utf-8"
        else:
            content = text = {"latin1": "é", "gb18030": "中"}.get(encoding, text)
        raw = encode(content, encoding)
        path.write_bytes(COMPRESSIONS[compression](raw) if raw else b"")
        texts[str(path)] = text.replace("\n", "\r\n") if encoding == "crlf" else text
        if encoding in REFUSED:
            refused.add(str(path))
    for folder, stem, target in links:
        path = root / folder / f"{stem}.txt"
        # A link to a hidden file is read, and its name, not that of its target, says how.
        first = next((Path(name) for name in texts if re.fullmatch(r"/[^.]+(\.txt|\.md)", name)), None)
        if not os.path.lexists(path) and first is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            targets = {"file": first, "folder": first.parent, "up": root.parent, "nowhere": root / "nowhere"}
            path.symlink_to(targets[target])
    return texts, refused


def pieces_by_text(manifest: CorpusManifest) -> dict[str, list[tuple[str, str]]]:
    """Return the splits and texts of each drawn text, in order, by its letter."""
    pieces: dict[str, list[tuple[str, str]]] = {}
    for split, parts in manifest.split_parts.items():
        ids = set()
        for document in (document for part in parts for document in part.iter_documents()):
            assert document.id not in ids, "ids are unique"
            ids.add(document.id)
            text = document.read()
            if not text.strip():  # refused when it is tokenized
                raise DataError(f"'{document.path}' has no words.")
            pieces.setdefault(text.strip()[0], []).append((split, text))
    return pieces


@settings(deadline=None, max_examples=200)
@given(st.lists(FILES, min_size=1, max_size=14), st.lists(LINKS, max_size=3))
def test_every_byte_is_in_one_split_or_named(
    tmp_path_factory: pytest.TempPathFactory, files: list[Any], links: list[Any]
) -> None:
    root = tmp_path_factory.mktemp("around") / "books [v1]*"
    texts, refused = draw_folder(root, files, links)
    problem = ""
    try:
        manifest = FileSource([str(root)]).scan()
        pieces = pieces_by_text(manifest)
    except DataError as error:
        problem = str(error)
    if problem:  # a file that is refused, or none that can be read, is named
        assert os.path.realpath(re.findall(r"'(.+?)'", problem)[0]) in refused or "holds no text" in problem, problem
        return
    assert not manifest.unsplit_parts
    left_out = {path for paths in manifest.left_out.values() for path in paths}
    assert all(str(root / Path(path)) == path for path in left_out)
    assert all(any(Path(path).name in note for note in manifest.notes) for path in sorted(left_out)[:1])
    for path, text in texts.items():
        is_titles = path == f"{root}/metadata.csv"
        is_named = any(path == other or path.startswith(f"{other}/") for other in left_out) or is_titles
        parts = pieces.pop(text.strip()[0], [])
        assert bool(parts) != is_named, path
        assert len({split for split, _ in parts}) == len(parts)
        assert "".join(piece for _, piece in parts) == text or is_named
    assert not pieces
    if all(isinstance(part, Document) and not part.is_table_row for part, _ in manifest.iter_parts()):
        assert open_corpus(root).split_parts | manifest.split_parts == open_corpus(root).split_parts


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"Words of {name}.")
    return root


def ids(root: Path | str) -> dict[str, list[str]]:
    corpus = open_corpus(root)
    return {split: [document.id for document in corpus.split_parts[split]] for split in corpus.splits}


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "train/a.txt", "train/b.txt", "blobs/1", "blobs/2")
    root = write(tmp_path / "root", "validation/c.txt")
    (root / "train").symlink_to(tmp_path / "elsewhere" / "train")
    (root / "test").mkdir()
    (root / "test" / "t.txt").symlink_to(tmp_path / "elsewhere" / "blobs" / "1")  # as in the cache of a hub
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "test" / "self.txt").symlink_to(root / "test" / "self.txt")
    (root / "test" / "leak.txt").symlink_to(root / "validation" / "c.txt")
    (root / "zz").symlink_to(tmp_path / "elsewhere" / "train")
    os.mkfifo(root / "train.txt")
    assert ids(root) == {"validation": ["c"], "test": ["t"], "train": ["a", "b"]}
    left_out = {reason: [Path(path).name for path in paths] for reason, paths in open_corpus(root).left_out.items()}
    assert left_out == {
        SPECIAL: ["train.txt"],
        READ_ALREADY: ["loop", "up", "zz", "leak.txt"],
        BROKEN_LINK: ["self.txt"],
    }
    # Given as paths of one source, files are read once too.
    manifest = FileSource([str(root / "zz"), str(root / "train"), str(root / "train" / "a.txt")]).scan()
    assert len(manifest.left_out[READ_ALREADY]) == 2
    assert {document.id for document in manifest.split_parts["train"]} == {"a.txt", "b.txt"}  # type: ignore[attr-defined]


def test_readme_hidden_and_copied_files_are_no_books(tmp_path: Path) -> None:
    books = [f"{number}.txt" for number in range(12)]
    others = ["README.md", "deep/readme.zh-CN.txt", "LICENSE", "LICENCE-MIT.txt", "COPYING", ".git/x.txt", "a.pdf", "5"]
    write(tmp_path, *books, *others)
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"The same book."))
    corpus = open_corpus(tmp_path)
    assert sorted(document.id for documents in corpus.split_parts.values() for document in documents) == sorted(books)
    note, assignment = corpus.notes
    pages = "5 README, licence or metadata (COPYING, LICENCE-MIT.txt, LICENSE, ...)"
    for part in (pages, "2 with other endings", f"1 {HIDDEN}"):
        assert part in note
    assert f"1 {COMPRESSED_COPY} (3.txt.gz)" in note
    assert "whole documents are assigned to splits (0.9 train" in assignment
    assert FileSource([str(tmp_path)]).scan() == CorpusManifest(**vars(corpus))
    # Given by name, anything is a text.
    assert ids(tmp_path / "README.md")["train"] == ["README.md"]
    with pytest.raises(DataError, match=r"holds no text, expected files ending in \.txt.*1 hidden .*COPYING"):
        open_corpus(write(tmp_path / "none", ".a.txt", "COPYING"))


@pytest.mark.parametrize("name", ["books [v1]", "b*oks?", "a::b", "ünï çode", "x.zip", "50%"])
def test_existing_paths_are_no_patterns(name: str, tmp_path: Path) -> None:
    root = write(tmp_path / name, "train/a [1].txt", "train/b.txt", "valid/c?.txt", "test/*.txt")
    expected = {"train": ["a [1]", "b"], "validation": ["c?"], "test": ["*"]}
    assert ids(root) == ids(f"{root}/") == expected
    manifest = FileSource([f"{root}/*/*.txt"]).scan()  # a pattern below such a path
    assert {split: [part.id for part in parts] for split, parts in manifest.split_parts.items()} == expected  # type: ignore[attr-defined]
    manifest = FileSource([f"{root}/*"]).scan()
    assert {split: [part.id for part in parts] for split, parts in manifest.split_parts.items()} == expected  # type: ignore[attr-defined]
    assert open_corpus(root / "train" / "a [1].txt").get_split("train")
    with pytest.raises(DataError, match="no path matches the pattern"):
        list_files(f"{root}/[ab]*.md")
    with zipfile.ZipFile(tmp_path / f"{name}.1.zip", "w") as archive:
        for path in sorted(root.rglob("*.txt")):
            archive.write(path, path.relative_to(root))
        archive.writestr("__MACOSX/train/._b.txt", "no text")
    if "::" not in name:  # which chains file systems in a URL
        assert ids(tmp_path / f"{name}.1.zip") == expected


def test_equal_names_in_two_folders_have_two_ids(tmp_path: Path) -> None:
    root = write(tmp_path, "train/a/x.txt", "train/b/x.txt", "train/x.md", "train/y.txt", "valid/x.txt")
    assert ids(root) == {"train": ["train/a/x.txt", "train/b/x.txt", "train/x.md", "y"], "validation": ["x"]}
    manifest = FileSource([str(root / "train" / "a"), str(root / "train" / "b")]).scan()
    assert [part.id for part in manifest.split_parts["train"]] == ["a/x.txt", "b/x.txt"]  # type: ignore[attr-defined]
    tables = [root / name / "part" / "rows.jsonl" for name in ("one", "two")]
    for path in tables:
        path.parent.mkdir(parents=True)
        path.write_text('{"text": "Some words of a row."}\n')
    parts = FileSource([str(path.parent) for path in tables]).scan().split_parts["train"]
    assert len({document.id for part in parts for document in part.iter_documents()}) == 2


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for number in range(12):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff%d.txt" % number)).write_text("Some words.")
    corpus = open_corpus(tmp_path)
    tokens = tokenize_corpus(tmp_path / "tokens", corpus, ByteTokenizer(), num_workers=1)
    assert tokens.splits["train"]["documents"] == 10


def test_a_tokenizer_is_trained_on_training_texts_alone(tmp_path: Path) -> None:
    class Recorder(BytePairTokenizer):
        def train(self, texts: Any) -> None:
            trained_on.extend(texts)
            super().train(trained_on)

    root = tmp_path / "books"
    write(root, "train/a.txt", "val/b.txt", "test/c.txt", "d.txt")
    sources = (open_corpus(root), FileSource([str(root)]).scan(), open_corpus(write(tmp_path / "x", "1.txt")))
    for index, source in enumerate(sources):
        trained_on: list[str] = []
        expected = [document.read() for document in source.split_parts["train"]]  # type: ignore[attr-defined]
        train_tokenizer(Recorder(260), source, tmp_path / str(index))
        assert trained_on == expected


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")

    def iterdir(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return map(Path, [f"{path}/a.txt", f"{path}/closed"])

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(MemtxError, match=r"could not be listed: PermissionError: .*closed"):
        open_corpus(tmp_path)
