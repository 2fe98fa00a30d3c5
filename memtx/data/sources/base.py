"""Sources of text: documents, their parts and splits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from memtx.data.encodings import decode_utf8
from memtx.data.sources.listing import describe_left_out, get_compression, open_file
from memtx.data.sources.splits import SPLIT_HINT
from memtx.errors import DataError, closest_match

READ_SIZE = 1 << 20  # bytes of a file read at once
SPLITS = ("train", "validation", "test")


class SourcePart(ABC):
    """A part of a source that one process reads: a file, a byte range of lines, some rows of a table.

    Subclasses are frozen dataclasses of plain values, so that a worker process can be sent one.
    """

    size: int  # bytes in the source (compressed bytes of a compressed one), for planning and progress

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

        Raises DataError with the name of a part that cannot be read, and the position in it.
        """


@dataclass(frozen=True)
class Document(SourcePart):
    """One text, not read yet."""

    id: str  # unique within the split
    title: str  # display name; the id where nothing better is known
    size: int  # bytes of UTF-8
    path: str | None = None  # file, or None if `text` holds the text
    byte_offset: int = 0  # where the document begins in the file
    text: str = ""
    is_table_row: bool = False  # a row of a table is skipped if it has no word

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
        """Yield portions of about 1 MB; raises DataError with the unreadable file, or the byte that is not UTF-8."""
        if self.path is None:
            yield self.text
        else:
            yield from decode_utf8(self.iter_bytes(), f"'{self.path}'", self.byte_offset)

    def iter_bytes(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``stop`` (None: the end) of the text as it is stored, decompressed."""
        if self.path is None:
            yield self.text.encode()[start:stop]
            return
        end = self._end if stop is None else self.byte_offset + stop
        with open_file(self.path) as file:
            position = self._seek(file, self.byte_offset + start)
            while (end is None or position < end) and (
                block := file.read(READ_SIZE if end is None else min(READ_SIZE, end - position))
            ):
                position += len(block)
                yield block

    @property
    def _end(self) -> int | None:
        """Offset in the file after the last byte, None for the end of the file."""
        return self.byte_offset + self.size

    def _seek(self, file: IO[bytes], position: int) -> int:
        return file.seek(position)

    def count_bytes(self) -> int:
        """Return the bytes of the text; reads a compressed one."""
        return self.size

    def cut(self, start: int, stop: int) -> Document:
        """Return bytes ``start`` to ``stop`` of the text as a document."""
        if self.path is None:
            text = self.text.encode()[start:stop].decode()
            return replace(self, text=text, size=stop - start)
        return replace(self, byte_offset=self.byte_offset + start, size=stop - start)

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.iter_text())


@dataclass(frozen=True)
class CorpusManifest:
    """All parts of a source, and the split of each document."""

    name: str  # for messages
    # Parts of each split, where the source has splits; in a fixed order.
    split_parts: Mapping[str, Sequence[SourcePart]] = field(default_factory=dict)
    # Parts whose documents are assigned to splits by their ids, and the fraction of each split: positive, adding to 1.
    unsplit_parts: Sequence[SourcePart] = ()
    split_fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # paths that are not read, by reason
    assignment: str = ""  # sentence that says how texts without a split were assigned

    @property
    def notes(self) -> list[str]:
        """Sentences to show: what is left out, and splits that the source does not have itself."""
        count = sum(map(len, self.left_out.values()))
        left_out = f"'{self.name}': not read: {describe_left_out(self.left_out, self.name)}." if count else ""
        return [note for note in (left_out, self.assignment) if note]

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
        """Return the documents of a split; raises DataError if there is no such split."""
        if split not in self.splits:
            raise DataError(
                f"'{self.name}' has no split '{split}', it has {', '.join(self.splits) or 'none'}."
                f"{closest_match(split, self.splits)}",
                f"{SPLIT_HINT} Or choose another split.",
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
        """List the parts; raises DataError if nothing is there, or it cannot be read."""


@dataclass(frozen=True)
class RemoteDocument(Document):
    """A text that is a whole file anywhere, maybe compressed, or a part of one.

    ``size`` is the stored size, or the bytes of the part; ``version`` changes with the file.
    """

    version: str = ""
    is_process_local: bool = False
    is_part: bool = False

    @property
    def cache_key(self) -> str:
        """Id, path, offset of a part, size and version of the file."""
        position = f":{self.byte_offset}" if self.is_part else ""
        return f"{self.id}:{self.path}{position}:{self.size}:{self.version}"

    @property
    def _end(self) -> int | None:
        return super()._end if self.is_part else None

    def _seek(self, file: IO[bytes], position: int) -> int:
        # By reading: not every file system and compression can seek.
        remaining = position
        while remaining and (block := file.read(min(READ_SIZE, remaining))):
            remaining -= len(block)
        return position - remaining

    def count_bytes(self) -> int:
        """Return the bytes of the text; reads a compressed one."""
        is_compressed = not self.is_part and get_compression(self.path or "") is not None
        return sum(map(len, self.iter_bytes())) if is_compressed else self.size

    def cut(self, start: int, stop: int) -> Document:
        """Return bytes ``start`` to ``stop`` of the text as a document."""
        return replace(super().cut(start, stop), is_part=True)  # type: ignore[call-arg]
