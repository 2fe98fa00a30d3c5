"""Plain text corpora: the PG-19 layout, any folder or file of texts, or the help texts that ship with Python.

Opening a corpus only lists documents; text is read when it is asked for, with newlines as they are in the file.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from memtx.data.sources.base import SPLITS, Corpus, Document
from memtx.errors import DataError, closest_match

BUILTIN_ROOTS = ("embedded", "embedded+sources")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
PG19_HINT = (
    "PG-19 is published by google-deepmind/pg19 on GitHub, its files in gs://deepmind-gutenberg: "
    "train/ validation/ test/ with one <id>.txt a book, and metadata.csv. "
    "Give the folder that holds them with --data.root PATH, or use --data.root embedded to try without."
)
METADATA_NAME = "metadata.csv"
MIN_WHOLE_DOCUMENTS = 10  # from which whole documents go to the splits; of fewer, each is cut into splits
MIN_TOPIC_LENGTH = 8000  # characters from which a help topic is a document; shorter ones are joined in order


def open_corpus(root: str | os.PathLike[str]) -> Corpus:
    """List the documents under a root.

    Raises DataError if the root does not exist, holds no text, or a file is empty.

    Args:
        root: ``embedded`` (Python's help topics), ``embedded+sources`` (with the sources of the standard library), a
            folder in the PG-19 layout, any other folder of text files, or one file.
    """
    name = str(root)
    if name in BUILTIN_ROOTS:
        return Corpus(name, _builtin_splits(include_stdlib=name.endswith("sources")))
    path = Path(root).expanduser()
    if path.is_file():
        return Corpus(name, _split_each_document([_file_document(path, path.name)]))
    if not path.is_dir():
        match = closest_match(name, BUILTIN_ROOTS)
        raise DataError(f"'{root}' does not exist, expected a folder of texts or one text file.{match}", PG19_HINT)
    if any((path / split).is_dir() for split in SPLITS):
        return Corpus(name, _pg19_splits(path))
    files = [file.relative_to(path) for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()]
    ids = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    documents = [_file_document(path / document_id, document_id) for document_id in ids]
    if not documents:
        raise DataError(f"'{root}' holds no text, expected files ending in {', '.join(TEXT_SUFFIXES)}.", PG19_HINT)
    split = _split_each_document if len(documents) < MIN_WHOLE_DOCUMENTS else _assign_whole_documents
    return Corpus(name, split(documents))


def _file_document(path: Path, document_id: str, title: str | None = None) -> Document:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"'{path}' is empty, expected a text.", "Remove the file or restore its text.")
    return Document(document_id, title or document_id, size, str(path))


def _pg19_splits(root: Path) -> dict[str, list[Document]]:
    metadata = root / METADATA_NAME
    titles = read_titles(metadata.read_bytes()) if metadata.is_file() else {}
    splits = {
        split: [_file_document(path, path.stem, titles.get(path.stem)) for path in sorted((root / split).glob("*.txt"))]
        for split in SPLITS
    }
    if not any(splits.values()):
        raise DataError(f"'{root}' has the folders of PG-19 but no .txt in them.", PG19_HINT)
    return splits


def read_titles(raw: bytes) -> dict[str, str]:
    """Return the titles by id in the bytes of PG-19's metadata.csv."""
    text = raw.decode("utf-8", errors="replace")
    return {row[0]: row[1] for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1}


def _assign_whole_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Assign whole documents 90/5/5 by a hash of their ids, at least one to each split."""
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    count = max(1, round(0.05 * len(ranked)))
    split_by_id = {document.id: "test" for document in ranked[:count]}
    split_by_id |= {document.id: "validation" for document in ranked[count : 2 * count]}
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[split_by_id.get(document.id, "train")].append(document)
    return splits


def _split_each_document(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Cut each document 90/5/5 at paragraph ends."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        first = _paragraph_end(document, 0.9)
        # In a text of a few bytes the first cut can pass the second one.
        borders = [0, first, max(first, _paragraph_end(document, 0.95)), document.size]
        for split, start, stop in zip(SPLITS, borders, borders[1:], strict=False):
            if stop > start:
                splits[split].append(Document(document.id, document.title, stop - start, document.path, start))
    return splits


def _paragraph_end(document: Document, fraction: float) -> int:
    """Return the byte after the first paragraph end past a fraction of the file, else after a line or character."""
    assert document.path is not None
    target = int(document.size * fraction)
    with open(document.path, "rb") as file:
        file.seek(target)
        # A fortieth of the text bounds the shift, so the three parts keep their order and about their sizes.
        window = file.read(max(4, min(document.size // 40, 1 << 22)))
    for pattern in (rb"\n\r?\n[\r\n]*", rb"\n", rb"(?=[\x00-\x7f\xc0-\xff])"):
        if match := re.search(pattern, window):
            return target + match.end()
    return document.size


def _builtin_splits(*, include_stdlib: bool) -> dict[str, list[Document]]:
    """Return the interpreter's help topics (``pydoc_data.topics``), every tenth in validation and every tenth in test.

    They change with the version of Python; the fingerprint of the tokens covers that. With ``include_stdlib`` the
    top-level source files of the standard library are added, about 10 MB.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        message = "This Python has no pydoc_data, the source of the embedded corpus."
        raise DataError(message, "Give texts with --data.root PATH.")
    from pydoc_data.topics import topics

    documents: list[Document] = []
    names: list[str] = []
    text = ""
    for name in sorted(topics):
        names.append(name)
        text += topics[name].strip("\n") + "\n\n\n"
        if len(text) >= MIN_TOPIC_LENGTH or name == max(topics):
            title = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            documents.append(Document("+".join(names), title, len(text.encode()), text=text))
            names, text = [], ""
    if include_stdlib:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents += [_file_document(path, path.name) for path in paths if path.stat().st_size]
    return {
        "train": [document for index, document in enumerate(documents) if index % 10 not in (4, 9)],
        "validation": documents[4::10],
        "test": documents[9::10],
    }
