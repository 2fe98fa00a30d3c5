"""Where texts come from: the PG-19 layout, any folder or file of texts, or what ships with Python.

A source only lists documents; text is read when asked for, in chunks, with newlines as they are in the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from memtx.data.sources.builtin_corpus import builtin_splits
from memtx.data.sources.document import Document
from memtx.data.sources.manifest import SPLITS
from memtx.errors import DataError, closest_match

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
PG19_HINT = (
    "PG-19 is published by google-deepmind/pg19 on GitHub, its files in gs://deepmind-gutenberg: "
    "train/ validation/ test/ with one <id>.txt a book, and metadata.csv. "
    "Give the folder that holds them with --data.root PATH, or use --data.root embedded to try without."
)
METADATA_NAME = "metadata.csv"
MIN_WHOLE_DOCUMENTS = 10
"""Below this many documents each one is cut into splits; from it on whole documents are dealt."""


@dataclass(frozen=True)
class Corpus:
    """The documents of every split.

    Attributes:
        name: the root as the user gave it.
        splits: the documents of each split that exists, in a fixed order.
    """

    name: str
    splits: dict[str, list[Document]]

    def get_split(self, name: str) -> list[Document]:
        """Return the documents of a split.

        Raises:
            DataError: there is no such split.
        """
        if not self.splits.get(name):
            known = [key for key, documents in self.splits.items() if documents]
            raise DataError(
                f"'{self.name}' has no split '{name}', it has {', '.join(known) or 'none'}."
                f"{closest_match(name, known)}",
                f"Add a folder '{name}' with one .txt a document, or choose another split.",
            )
        return self.splits[name]


def open_corpus(root: str | os.PathLike[str]) -> Corpus:
    """List the documents under a root.

    Args:
        root: ``embedded`` (Python's own topic texts), ``embedded+sources`` (with the standard library's sources), a
            folder in the PG-19 layout, any other folder of text files, or one file.

    Raises:
        DataError: nothing is there, a folder without texts, or an empty file; says what was expected.
    """
    if str(root) in ("embedded", "embedded+sources"):
        return Corpus(str(root), builtin_splits(include_stdlib=str(root).endswith("sources")))
    path = Path(root).expanduser()
    if path.is_file():
        return Corpus(str(root), _split_each_document([_file_document(path, path.name)]))
    if not path.is_dir():
        hint = closest_match(str(root), ["embedded", "embedded+sources"])
        raise DataError(f"'{root}' does not exist, expected a folder of texts or one text file.{hint}", PG19_HINT)
    if any((path / name).is_dir() for name in SPLITS):
        return Corpus(str(root), _pg19_splits(path))
    found = sorted(
        (file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    documents = [
        _file_document(file, file.relative_to(path).as_posix())
        for file in found
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not documents:
        raise DataError(f"'{root}' holds no text, expected files ending in {', '.join(TEXT_SUFFIXES)}.", PG19_HINT)
    return Corpus(
        str(root),
        _split_each_document(documents) if len(documents) < MIN_WHOLE_DOCUMENTS else _assign_whole_documents(documents),
    )


def _file_document(path: Path, name: str, title: str | None = None) -> Document:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"'{path}' is empty, expected a text.", "Remove the file or restore its text.")
    return Document(id=name, title=title or name, size=size, path=str(path))


def _pg19_splits(root: Path) -> dict[str, list[Document]]:
    notes = root / METADATA_NAME
    titles = read_titles(notes.read_bytes()) if notes.is_file() else {}
    splits: dict[str, list[Document]] = {}
    for name in SPLITS:
        files = sorted((root / name).glob("*.txt"))
        splits[name] = [_file_document(file, file.stem, titles.get(file.stem)) for file in files]
    if not any(splits.values()):
        raise DataError(f"'{root}' has the folders of PG-19 but no .txt in them.", PG19_HINT)
    return splits


def read_titles(raw: bytes) -> dict[str, str]:
    """Return titles by id of PG-19's metadata.csv."""
    text = raw.decode("utf-8", errors="replace")
    return {row[0]: row[1] for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1}


def _assign_whole_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Deal whole documents 90/5/5 by a hash of their names, at least one to each split."""
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    share = max(1, round(0.05 * len(ranked)))
    chosen = {document.id: "test" for document in ranked[:share]}
    chosen |= {document.id: "validation" for document in ranked[share : 2 * share]}
    return {name: [one for one in documents if chosen.get(one.id, "train") == name] for name in SPLITS}


def _split_each_document(documents: list[Document]) -> dict[str, list[Document]]:
    """Cut each document 90/5/5 at paragraph ends."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        first = _paragraph_end(document, 0.9)
        # In a text of a few bytes the first cut can pass the second one.
        places = [0, first, max(first, _paragraph_end(document, 0.95)), document.size]
        for name, start, stop in zip(SPLITS, places, places[1:], strict=False):
            if stop > start:
                part = Document(document.id, document.title, stop - start, document.path, start)
                splits[name].append(part)
    return splits


def _paragraph_end(document: Document, fraction: float) -> int:
    """Return the byte after the first paragraph end past a share of the file, else after a line, else a character."""
    assert document.path is not None
    target = int(document.size * fraction)
    with open(document.path, "rb") as handle:
        handle.seek(target)
        # A fortieth of the text bounds the shift, so the three parts keep their order and about their sizes.
        window = handle.read(max(4, min(document.size // 40, 1 << 22)))
    for pattern in (rb"\n\r?\n[\r\n]*", rb"\n", rb"(?=[\x00-\x7f\xc0-\xff])"):
        if found := re.search(pattern, window):
            return target + found.end()
    return document.size
