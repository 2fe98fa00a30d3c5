"""Sources of text: documents, the parts they are read from, and the splits they belong to."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memtx.data.text_chunks import decode_utf8
from memtx.errors import DataError, closest_match

READ_SIZE = 1 << 20
"""Bytes of a file read at once."""

SPLITS = ("train", "validation", "test")

SPLIT_ALIASES = {**{name: name for name in SPLITS}, "valid": "validation", "val": "validation", "dev": "validation"}
"""Our name of a split by the names that others use."""


class SourcePart(ABC):
    """A part of a source that one process reads: a file, a byte range of lines, some rows of a table.

    Subclasses are frozen dataclasses of plain values, so that a worker process can be sent one.

    Attributes:
        size: Bytes in the source (compressed bytes of a compressed one), for planning and progress.
    """

    size: int

    @property
    def is_process_local(self) -> bool:
        """True if only this process can read it, such as a file system in memory."""
        return False

    @property
    @abstractmethod
    def cache_key(self) -> str:
        """Text that changes when the part does, as far as can be told without reading it."""

    @abstractmethod
    def iter_documents(self) -> Iterator[Document]:
        """Yield whole documents in a fixed order; read each before asking for the next.

        Raises:
            DataError: The part cannot be read; names it and the position in it.
        """


@dataclass(frozen=True)
class Document(SourcePart):
    """One text, not read yet.

    Attributes:
        id: Name, unique within the split.
        title: Display name; the id where nothing better is known.
        size: Bytes of UTF-8.
        path: File, or None if ``text`` holds the text.
        byte_offset: Byte of the file where the document begins.
        text: The text itself, for sources without a file.
        is_table_row: True for a row of a table, which is skipped if it has no word.
    """

    id: str
    title: str
    size: int
    path: str | None = None
    byte_offset: int = 0
    text: str = ""
    is_table_row: bool = False

    @property
    def cache_key(self) -> str:
        """Id, offset, size and modification time of the file, or a hash of the text."""
        if self.path is None:
            return f"{self.id}:{hashlib.sha256(self.text.encode()).hexdigest()}"
        return f"{self.id}:{self.byte_offset}:{self.size}:{Path(self.path).stat().st_mtime_ns}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield the document itself."""
        yield self

    def iter_text(self) -> Iterator[str]:
        """Yield the text in portions of about 1 MB.

        Raises:
            DataError: The file cannot be read or is not UTF-8; names it and the byte.
        """
        if self.path is None:
            yield self.text
        else:
            yield from decode_utf8(self._read_bytes(self.path), self.path)

    def _read_bytes(self, path: str) -> Iterator[bytes]:
        remaining = self.size
        try:
            with open(path, "rb") as file:
                file.seek(self.byte_offset)
                while remaining and (block := file.read(min(remaining, READ_SIZE))):
                    remaining -= len(block)
                    yield block
        except OSError as error:
            raise DataError(f"'{path}' could not be read: {error.strerror}.", "Check the file.") from error

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.iter_text())


@dataclass(frozen=True)
class CorpusManifest:
    """All parts of a source, and the split of each document.

    Attributes:
        name: Name of the source, for messages.
        split_parts: Parts of each split, where the source has splits; in a fixed order.
        unsplit_parts: Parts whose documents are assigned to splits by their ids.
        split_fractions: Fraction of those documents for each split; positive, with a sum of 1.
    """

    name: str
    split_parts: Mapping[str, Sequence[SourcePart]] = field(default_factory=dict)
    unsplit_parts: Sequence[SourcePart] = ()
    split_fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that may have documents: train, validation, test, then others."""
        present = {split for split, parts in self.split_parts.items() if parts}
        if self.unsplit_parts:
            present |= set(self.split_fractions)
        names = dict.fromkeys((*SPLITS, *self.split_parts, *self.split_fractions))
        return tuple(split for split in names if split in present)

    def iter_parts(self) -> Iterator[tuple[SourcePart, Mapping[str, float]]]:
        """Yield every part with the split fractions of its documents."""
        for split in self.splits:
            yield from ((part, {split: 1.0}) for part in self.split_parts.get(split, ()))
        yield from ((part, self.split_fractions) for part in self.unsplit_parts)


@dataclass(frozen=True)
class Corpus(CorpusManifest):
    """A manifest whose parts are documents, each in one split."""

    split_parts: Mapping[str, Sequence[Document]] = field(default_factory=dict)

    def get_split(self, split: str) -> Sequence[Document]:
        """Return the documents of a split.

        Raises:
            DataError: There is no such split.
        """
        if split not in self.splits:
            raise DataError(
                f"'{self.name}' has no split '{split}', it has {', '.join(self.splits) or 'none'}."
                f"{closest_match(split, self.splits)}",
                f"Add a folder '{split}' with one .txt a document, or choose another split.",
            )
        return self.split_parts[split]


def assign_split(document_id: str, split_fractions: Mapping[str, float]) -> str:
    """Return the split of a document, a function of its id and the split fractions alone."""
    *first_splits, last = split_fractions
    if not first_splits:
        return last
    digest = hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    for split in first_splits:
        fraction -= split_fractions[split]
        if fraction < 0:
            return split
    return last


class TextSource(ABC):
    """A configurable source of text, scanned when it is needed."""

    @abstractmethod
    def scan(self) -> CorpusManifest:
        """List the parts.

        Raises:
            DataError: Nothing is there, or it cannot be read.
        """
