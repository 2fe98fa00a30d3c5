"""Tables of texts, a document a row: lines of JSON, and Parquet. Memory holds one text at a time, or a few."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from memtx.data.sources.document import READ_SIZE, Document, SourcePart
from memtx.data.sources.remote_files import RemoteFile, open_file
from memtx.data.tokenizers import encode_utf8
from memtx.errors import DataError, MemtxError, closest_match

BLOCK_BYTES = 8 << 20
"""Bytes of a file of lines that are a part."""
MAX_LINE_BYTES = 128 << 20
"""Bytes of a line at most: it is parsed as a whole."""
PARQUET_BATCH_SIZE = 16
"""Rows of a Parquet file in memory."""


@dataclass(frozen=True, kw_only=True)
class TablePart(SourcePart):
    """Some rows of a file.

    Attributes:
        path: the file.
        id_prefix: what its documents' names begin with.
        size: bytes of the rows.
        version: what changes when the file is written anew.
        text_column: the column that holds the texts.
        id_column: that of the documents' names; None for file and place.
        is_process_local: whether this process alone can read it.
    """

    path: str
    id_prefix: str
    size: int
    version: str
    text_column: str = "text"
    id_column: str | None = None
    is_process_local: bool = False


@dataclass(frozen=True, kw_only=True)
class JsonLinesPart(TablePart):
    """The lines that begin within a stretch of a file of JSON objects, one a line; ``size`` is as they are stored.

    Attributes:
        start: the first byte of the stretch.
        stop: the byte behind it; None for the rest of the file.
    """

    start: int
    stop: int | None

    @property
    def cache_key(self) -> str:
        """Place, stretch and version of the file, and the fields."""
        return f"{self.path}:{self.start}:{self.stop}:{self.size}:{self.version}:{self.text_column}:{self.id_column}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield a document a line; empty lines are passed over."""
        with open_file(self.path) as handle:
            for place, line in _iter_lines(handle, self.path, self.start, self.stop):
                if not line.isspace():
                    yield row_to_document(
                        f"'{self.path}', byte {place}",
                        self._parse_line(line, place),
                        f"{self.id_prefix}@{place}",
                        self.text_column,
                        self.id_column,
                    )

    def _parse_line(self, line: bytes, offset: int) -> Mapping[str, Any]:
        where, cure = f"'{self.path}', byte {offset}", "Every line is to be one, in UTF-8."
        try:
            record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: the line is no JSON: {error}.", cure) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: the line is a {type(record).__name__}, expected a JSON object.", cure)
        return record


def _iter_lines(handle: IO[bytes], path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin at bytes start to stop, each with where it begins."""
    held, searched, place = b"", 0, start
    if start:
        # The line before tells whether one begins right here.
        handle.seek(start - 1)
        place -= 1
    first = bool(start)
    while chunk := handle.read(READ_SIZE):
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
        if len(held) > MAX_LINE_BYTES:
            if first:  # The line of another part, which says so.
                held, searched, place = b"", 0, place + len(held)
                if stop is not None and place >= stop:
                    return
                continue
            raise DataError(
                f"'{path}', byte {place}: the line has more than {MAX_LINE_BYTES:,} bytes.", "Split the text."
            )
    if held and not first:
        yield place, held


@dataclass(frozen=True, kw_only=True)
class ParquetPart(TablePart):
    """A row group of a Parquet file; ``size`` is that of its texts, uncompressed.

    Attributes:
        row_group: number of the row group.
        first_row: number of its first row in the file.
    """

    row_group: int
    first_row: int

    @property
    def cache_key(self) -> str:
        """Place, row group and version of the file, and the columns."""
        rows = f"{self.row_group}:{self.first_row}:{self.size}"
        return f"{self.path}:{rows}:{self.version}:{self.text_column}:{self.id_column}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield a document a row."""
        columns = [self.text_column] if self.id_column is None else [self.text_column, self.id_column]
        number = self.first_row
        with open_file(self.path) as handle:
            # Read by pages, so that a row group of gigabytes is never held.
            table = _import_parquet().ParquetFile(handle, buffer_size=READ_SIZE, pre_buffer=False)
            for batch in table.iter_batches(
                PARQUET_BATCH_SIZE, row_groups=[self.row_group], columns=columns, use_threads=False
            ):
                for record in batch.to_pylist():
                    where, name = f"'{self.path}', row {number}", f"{self.id_prefix}@{number}"
                    yield row_to_document(where, record, name, self.text_column, self.id_column)
                    number += 1


def row_to_document(
    location: str, record: Mapping[str, Any], document_id: str, text_column: str, id_column: str | None
) -> Document:
    """Return the document that a row of a table is.

    Args:
        location: the row, for messages.
        record: its columns.
        document_id: what to call it where no column says.
        text_column: the column of its text.
        id_column: that of its name, if any.

    Raises:
        DataError: there is no such column, or no text in it.
    """
    if text_column not in record:
        raise DataError(
            f"{location}: there is no '{text_column}'.{closest_match(text_column, map(str, record))}",
            "Name it by --text-column.",
        )
    text = "" if record[text_column] is None else record[text_column]
    if not isinstance(text, str):
        raise DataError(
            f"{location}: '{text_column}' is a {type(text).__name__}, expected a text.", "Name it by --text-column."
        )
    if id_column is not None:
        given = record.get(id_column)
        if given is None or isinstance(given, dict | list):
            raise DataError(f"{location}: there is no name in '{id_column}'.", "Name another one by --id-column.")
        document_id = str(given)
    try:
        encode_utf8(document_id)
        return Document(document_id, document_id, len(encode_utf8(text)), text=text, is_table_row=True)
    except MemtxError as error:
        raise DataError(f"{location}: {error.message}", error.hint) from error


def json_lines_parts(file: RemoteFile, text_column: str, id_column: str | None) -> list[SourcePart]:
    """Return the parts of a file of JSON objects, one a line."""
    stretches: list[tuple[int, int | None]] = [(0, None)]
    if file.is_seekable:
        stretches = [(start, min(start + BLOCK_BYTES, file.size)) for start in range(0, file.size, BLOCK_BYTES)]
    return [
        JsonLinesPart(
            **_common_fields(file, text_column, id_column),
            start=start,
            stop=stop,
            size=file.size if stop is None else stop - start,
        )
        for start, stop in stretches
    ]


def _common_fields(file: RemoteFile, text_column: str, id_column: str | None) -> dict[str, Any]:
    """Return what all parts of a file have alike."""
    version = f"{file.size}:{file.version}"
    return {
        "path": file.url, "id_prefix": file.name, "version": version,
        "text_column": text_column, "id_column": id_column, "is_process_local": file.is_process_local,
    }  # fmt: skip


def parquet_parts(file: RemoteFile, text_column: str, id_column: str | None) -> list[SourcePart]:
    """Return the parts of a Parquet file, a row group each.

    Raises:
        DataError: pyarrow is not installed, or the file is no Parquet or has no such column.
    """
    parquet = _import_parquet()
    parts: list[SourcePart] = []
    with open_file(file.url) as handle:
        meta = parquet.ParquetFile(handle).metadata
        names = [meta.schema.column(number).path for number in range(meta.num_columns)]
        for name, option in ((text_column, "--text-column"), (id_column, "--id-column")):
            if name is not None and name not in names:
                raise DataError(
                    f"'{file.url}' has no column '{name}', it has {', '.join(names[:20])}.{closest_match(name, names)}",
                    f"Name it by {option}.",
                )
        first, column = 0, names.index(text_column)
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            size = group.column(column).total_uncompressed_size
            parts.append(
                ParquetPart(
                    **_common_fields(file, text_column, id_column), row_group=number, first_row=first, size=size
                )
            )
            first += group.num_rows
    return parts


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "Parquet is read with pyarrow, which is not installed.", "pip install 'memtx[data]'."
        ) from error
    return pyarrow.parquet
