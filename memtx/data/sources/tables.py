"""Tables of texts, a document a row: lines of JSON, and Parquet. Memory holds one text at a time, or a few."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from memtx.data.document import CHUNK, Document, Part
from memtx.data.sources.places import Place, opened
from memtx.data.tokenizers import utf8
from memtx.errors import DataError, MemtxError, nearest

BLOCK = 8 << 20
"""Bytes of a file of lines that are a part."""
LONGEST = 128 << 20
"""Bytes of a line at most: it is parsed as a whole."""
AT_A_TIME = 16
"""Rows of a Parquet file in memory."""


@dataclass(frozen=True, kw_only=True)
class Table(Part):
    """Some rows of a file.

    Attributes:
        path: the file.
        name: what its documents' names begin with.
        size: bytes of the rows.
        version: what changes when the file is written anew.
        field: the column that holds the texts.
        id_field: that of the documents' names; None for file and place.
        here: whether this process alone can read it.
    """

    path: str
    name: str
    size: int
    version: str
    field: str = "text"
    id_field: str | None = None
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class Lines(Table):
    """The lines that begin within a stretch of a file of JSON objects, one a line; ``size`` is as they are stored.

    Attributes:
        start: the first byte of the stretch.
        stop: the byte behind it; None for the rest of the file.
    """

    start: int
    stop: int | None

    @property
    def stamp(self) -> str:
        """Place, stretch and version of the file, and the fields."""
        return f"{self.path}:{self.start}:{self.stop}:{self.size}:{self.version}:{self.field}:{self.id_field}"

    def documents(self) -> Iterator[Document]:
        """Yield a document a line; empty lines are passed over."""
        with opened(self.path) as handle:
            for place, line in _lines(handle, self.path, self.start, self.stop):
                if not line.isspace():
                    yield document_of(
                        f"'{self.path}', byte {place}",
                        self._record(line, place),
                        f"{self.name}@{place}",
                        self.field,
                        self.id_field,
                    )

    def _record(self, line: bytes, place: int) -> Mapping[str, Any]:
        where, cure = f"'{self.path}', byte {place}", "Every line is to be one, in UTF-8."
        try:
            record = json.loads(line.decode("utf-8-sig" if place == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: the line is no JSON: {error}.", cure) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: the line is a {type(record).__name__}, expected a JSON object.", cure)
        return record


def _lines(handle: IO[bytes], path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin at bytes start to stop, each with where it begins."""
    held, searched, place = b"", 0, start
    if start:
        # The line before tells whether one begins right here.
        handle.seek(start - 1)
        place -= 1
    first = bool(start)
    while chunk := handle.read(CHUNK):
        held += chunk
        begin = 0
        while (end := held.find(b"\n", max(begin, searched))) >= 0:
            if not first:
                yield place, held[begin : end + 1]
            first = False
            place += end + 1 - begin
            begin = end + 1
            if stop is not None and place >= stop:
                return
        held = held[begin:]
        searched = len(held)
        if len(held) > LONGEST:
            if first:  # The line of another part, which says so.
                held, searched, place = b"", 0, place + len(held)
                if stop is not None and place >= stop:
                    return
                continue
            raise DataError(f"'{path}', byte {place}: the line has more than {LONGEST:,} bytes.", "Split the text.")
    if held and not first:
        yield place, held


@dataclass(frozen=True, kw_only=True)
class Rows(Table):
    """A row group of a Parquet file; ``size`` is that of its texts, uncompressed.

    Attributes:
        group: number of the row group.
        first: number of its first row in the file.
    """

    group: int
    first: int

    @property
    def stamp(self) -> str:
        """Place, row group and version of the file, and the columns."""
        return f"{self.path}:{self.group}:{self.first}:{self.size}:{self.version}:{self.field}:{self.id_field}"

    def documents(self) -> Iterator[Document]:
        """Yield a document a row."""
        columns = [self.field] if self.id_field is None else [self.field, self.id_field]
        number = self.first
        with opened(self.path) as handle:
            # Read by pages, so that a row group of gigabytes is never held.
            table = _parquet().ParquetFile(handle, buffer_size=CHUNK, pre_buffer=False)
            for batch in table.iter_batches(AT_A_TIME, row_groups=[self.group], columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    where, name = f"'{self.path}', row {number}", f"{self.name}@{number}"
                    yield document_of(where, record, name, self.field, self.id_field)
                    number += 1


def document_of(where: str, record: Mapping[str, Any], name: str, field: str, id_field: str | None) -> Document:
    """Return the document that a row of a table is.

    Args:
        where: the row, for messages.
        record: its columns.
        name: what to call it where no column says.
        field: the column of its text.
        id_field: that of its name, if any.

    Raises:
        DataError: there is no such column, or no text in it.
    """
    if field not in record:
        raise DataError(f"{where}: there is no '{field}'.{nearest(field, map(str, record))}", "Name it by --field.")
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: '{field}' is a {type(text).__name__}, expected a text.", "Name it by --field.")
    if id_field is not None:
        given = record.get(id_field)
        if given is None or isinstance(given, dict | list):
            raise DataError(f"{where}: there is no name in '{id_field}'.", "Name another one by --id-field.")
        name = str(given)
    try:
        utf8(name)
        return Document(name, name, len(utf8(text)), text=text, row=True)
    except MemtxError as error:
        raise DataError(f"{where}: {error.what}", error.cure) from error


def lines(place: Place, field: str, id_field: str | None) -> list[Part]:
    """Return the parts of a file of JSON objects, one a line."""
    stretches: list[tuple[int, int | None]] = [(0, None)]
    if place.seekable:
        stretches = [(start, min(start + BLOCK, place.size)) for start in range(0, place.size, BLOCK)]
    return [
        Lines(
            **_shared(place, field, id_field),
            start=start,
            stop=stop,
            size=place.size if stop is None else stop - start,
        )
        for start, stop in stretches
    ]


def _shared(place: Place, field: str, id_field: str | None) -> dict[str, Any]:
    """Return what all parts of a file have alike."""
    version = f"{place.size}:{place.version}"
    return {
        "path": place.url, "name": place.name, "version": version,
        "field": field, "id_field": id_field, "here": place.here,
    }  # fmt: skip


def rows(place: Place, field: str, id_field: str | None) -> list[Part]:
    """Return the parts of a Parquet file, a row group each.

    Raises:
        DataError: pyarrow is not installed, or the file is no Parquet or has no such column.
    """
    parquet = _parquet()
    parts: list[Part] = []
    with opened(place.url) as handle:
        meta = parquet.ParquetFile(handle).metadata
        names = [meta.schema.column(number).path for number in range(meta.num_columns)]
        for name, option in ((field, "--field"), (id_field, "--id-field")):
            if name is not None and name not in names:
                raise DataError(
                    f"'{place.url}' has no column '{name}', it has {', '.join(names[:20])}.{nearest(name, names)}",
                    f"Name it by {option}.",
                )
        first, column = 0, names.index(field)
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            size = group.column(column).total_uncompressed_size
            parts.append(Rows(**_shared(place, field, id_field), group=number, first=first, size=size))
            first += group.num_rows
    return parts


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "Parquet is read with pyarrow, which is not installed.", "pip install 'memtx[data]'."
        ) from error
    return pyarrow.parquet
