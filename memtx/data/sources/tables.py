"""Tables of texts, one document a row: JSON, CSV and Parquet. Memory holds one text at a time, or a few."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from memtx.data.encodings import decode_utf8, encode_utf8
from memtx.data.sources.base import READ_SIZE, Document, SourcePart
from memtx.data.sources.listing import SourceFile, open_file
from memtx.errors import DataError, MemtxError, closest_match

BLOCK_BYTES = 8 << 20  # of a part of a JSON lines file
MAX_LINE_BYTES = 128 << 20  # a line is parsed as a whole
PARQUET_BATCH_SIZE = 16  # rows in memory

_JSON_SPACE, _JSON_SEPARATORS = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")


@dataclass(frozen=True)
class TableColumns:
    """Columns of the texts and of the document ids in a table; None as ``id`` uses the row's position."""

    text: str = "text"
    id: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the columns to read."""
        return [self.text] if self.id is None else [self.text, self.id]

    def check(self, available: Sequence[str], table: str) -> None:
        """Raise DataError if a table does not have the columns."""
        for name, option in zip(self.names, ("--text-column", "--id-column"), strict=False):
            if name not in available:
                match = closest_match(name, available)
                message = f"{table} has no column '{name}', it has {', '.join(available[:20])}.{match}"
                raise DataError(message, f"Name another column with {option} of memtx prepare.")

    def to_document(self, location: str, record: Mapping[str, Any], default_id: str) -> Document:
        """Return the document of a row; messages name its ``location``, and ``default_id`` is for tables without ids.

        Raises DataError if a column is missing, or holds no text or no id.
        """
        hint = "Name the column of the texts with --text-column of memtx prepare."
        if self.text not in record:
            match = closest_match(self.text, map(str, record))
            raise DataError(f"{location}: there is no '{self.text}'.{match}", hint)
        text = "" if record[self.text] is None else record[self.text]
        if not isinstance(text, str):
            raise DataError(f"{location}: '{self.text}' is a {type(text).__name__}, expected a text.", hint)
        document_id = default_id if self.id is None else record.get(self.id)
        if document_id is None or isinstance(document_id, dict | list):
            hint = "Name another column with --id-column of memtx prepare."
            raise DataError(f"{location}: there is no id in '{self.id}'.", hint)
        document_id = str(document_id)
        if "\0" in text:
            raise DataError(f"{location}: '{self.text}' holds a NUL character, expected a text.", "Remove the row.")
        try:
            encode_utf8(document_id)
            return Document(document_id, document_id, len(encode_utf8(text)), text=text, is_table_row=True)
        except MemtxError as error:
            raise DataError(f"{location}: {error.message}", error.hint) from error


@dataclass(frozen=True)
class TablePart(SourcePart):
    """Some rows of a file; ``size`` is their bytes."""

    file: SourceFile
    columns: TableColumns
    size: int

    @property
    def is_process_local(self) -> bool:
        """True if only this process can read the file."""
        return self.file.is_process_local

    def _cache_key(self, *position: object) -> str:
        fields = (self.file.url, *position, self.size, self.file.size, self.file.version)
        return ":".join(map(str, (*fields, self.columns.text, self.columns.id)))

    def _to_document(self, unit: str, index: int, record: Mapping[str, Any]) -> Document:
        return self.columns.to_document(f"'{self.file.url}', {unit} {index}", record, f"{self.file.name}@{index}")


@dataclass(frozen=True)
class JsonLinesPart(TablePart):
    """The JSON objects of lines that begin at bytes ``start`` to ``stop`` (None: the end); ``size`` is as stored."""

    start: int
    stop: int | None

    @property
    def cache_key(self) -> str:
        """URL, byte range and version of the file, and the columns."""
        return self._cache_key(self.start, self.stop)

    def iter_documents(self) -> Iterator[Document]:
        """Yield one document a line; empty lines are skipped."""
        url = self.file.url
        with open_file(url) as stream:
            for offset, line in _iter_lines(stream, url, self.start, self.stop):
                if not line.isspace():
                    yield self._to_document("byte", offset, _parse_line(line, url, offset))


def _parse_line(line: bytes, url: str, offset: int) -> Mapping[str, Any]:
    location, hint = f"'{url}', byte {offset}", "Every line must be a JSON object in UTF-8."
    try:
        record = json.loads("".join(decode_utf8([line], f"'{url}'", offset)))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: the line is no JSON: {error}.", hint) from error
    if not isinstance(record, dict):
        raise DataError(f"{location}: the line is a {type(record).__name__}, expected a JSON object.", hint)
    return record


@dataclass(frozen=True)
class RecordsPart(TablePart):
    """All rows of a file that is read from the start: JSON of any layout, CSV or TSV."""

    @property
    def cache_key(self) -> str:
        """URL and version of the file, and the columns."""
        return self._cache_key()

    def iter_documents(self) -> Iterator[Document]:
        """Yield one document a row."""
        url, parse = self.file.url, _parse_json if self.file.suffix == ".json" else self._parse_csv
        with open_file(url) as stream:
            chunks = decode_utf8(iter(lambda: stream.read(READ_SIZE), b""), f"'{url}'")
            for row, record in enumerate(parse(chunks, url)):
                yield self._to_document("row", row, record)

    def _parse_csv(self, chunks: Iterator[str], url: str) -> Iterator[Mapping[str, Any]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        delimiter = "\t" if self.file.suffix == ".tsv" else ","
        rows = csv.reader(_join_lines(chunks, url), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            self.columns.check(header, f"'{url}'")
            for row, fields in enumerate(filter(None, rows)):
                if len(fields) != len(header):
                    message = f"'{url}', row {row}: there are {len(fields)} fields, the header has {len(header)}."
                    raise DataError(message, f"Quote texts with the delimiter {delimiter!r}.")
                yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            message = f"'{url}', line {rows.line_num}: the table cannot be parsed: {error}."
            raise DataError(message, "Quote texts, and double the quotation marks in them.") from error


def _join_lines(chunks: Iterator[str], url: str) -> Iterator[str]:
    pending = ""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(pending) > MAX_LINE_BYTES:
            raise DataError(f"'{url}': a line has more than {MAX_LINE_BYTES:,} characters.", "Split the text.")
    if pending:
        yield pending


def _parse_json(chunks: Iterator[str], url: str) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a JSON array, or objects one after another, on a line each or not."""
    decoder, buffer, position, row = json.JSONDecoder(), "", 0, 0
    in_array: bool | None = None  # None before the first character
    hint = "Give a JSON array of objects, or one object a line."
    while True:
        separators = _JSON_SEPARATORS if in_array else _JSON_SPACE
        position = cast(re.Match[str], separators.match(buffer, position)).end()
        if in_array is None and position < len(buffer):
            in_array = buffer[position] == "["
            position += in_array
            continue
        if in_array and buffer.startswith("]", position):
            in_array, position = False, position + 1
            continue
        try:
            record, position = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            # Maybe the value goes on: as much again is read, so that a long one takes linear time.
            buffer, position, length = buffer[position:], 0, len(buffer) - position
            while len(buffer) <= 2 * length <= 2 * MAX_LINE_BYTES and (chunk := next(chunks, "")):
                buffer += chunk
            if len(buffer) > length and not isinstance(error, RecursionError):
                continue
            if not buffer and not in_array:
                return
            reason = "the array is not closed" if not buffer else f"{error}"
            raise DataError(f"'{url}', row {row}: no JSON: {reason}.", hint) from error
        if not isinstance(record, dict):
            message = f"'{url}', row {row}: the value is a {type(record).__name__}, expected a JSON object."
            raise DataError(message, hint)
        yield record
        row += 1


def _iter_lines(file: IO[bytes], path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of every line that begins at bytes ``start`` to ``stop``."""
    reader, offset = io.BufferedReader(cast(io.RawIOBase, file), READ_SIZE), start
    end = math.inf if stop is None else stop
    if start:
        # The byte before tells whether a line begins right at `start`; the part in which a line begins yields it.
        offset = reader.seek(start - 1)
        while offset < end and (block := reader.readline(READ_SIZE)):
            offset += len(block)
            if block.endswith(b"\n"):
                break
    while offset < end and (line := reader.readline(MAX_LINE_BYTES + 1)):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            message = f"'{path}', byte {offset}: the line has more than {MAX_LINE_BYTES:,} bytes."
            raise DataError(message, "Split the text.")
        yield offset, line
        offset += len(line)


@dataclass(frozen=True)
class ParquetPart(TablePart):
    """A row group of a Parquet file, whose texts have ``size`` bytes, uncompressed."""

    row_group: int
    first_row: int  # index in the file

    @property
    def cache_key(self) -> str:
        """URL, row group and version of the file, and the columns."""
        return self._cache_key(self.row_group, self.first_row)

    def iter_documents(self) -> Iterator[Document]:
        """Yield one document a row."""
        row = self.first_row
        with open_file(self.file.url) as stream:
            # Read by pages, so that a row group of gigabytes is never in memory.
            table = _import_parquet().ParquetFile(stream, buffer_size=READ_SIZE, pre_buffer=False)
            for batch in table.iter_batches(
                PARQUET_BATCH_SIZE, row_groups=[self.row_group], columns=self.columns.names, use_threads=False
            ):
                for record in batch.to_pylist():
                    yield self._to_document("row", row, record)
                    row += 1


def records_parts(file: SourceFile, columns: TableColumns) -> list[TablePart]:
    """Return a JSON, CSV or TSV file as one part."""
    return [RecordsPart(file, columns, file.size)]


def json_lines_parts(file: SourceFile, columns: TableColumns) -> list[TablePart]:
    """Return the parts of a file of JSON objects, one a line; a compressed file is one part."""
    if not file.is_seekable:
        return [JsonLinesPart(file, columns, file.size, 0, None)]
    ranges = [(start, min(start + BLOCK_BYTES, file.size)) for start in range(0, file.size, BLOCK_BYTES)]
    return [JsonLinesPart(file, columns, stop - start, start, stop) for start, stop in ranges]


def parquet_parts(file: SourceFile, columns: TableColumns) -> list[TablePart]:
    """Return a Parquet file's row groups; raises DataError without pyarrow or a column, or for another format."""
    parquet = _import_parquet()
    parts: list[TablePart] = []
    with open_file(file.url) as stream:
        metadata = parquet.ParquetFile(stream).metadata
        names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        columns.check(names, f"'{file.url}'")
        first_row, text_index = 0, names.index(columns.text)
        for row_group in range(metadata.num_row_groups):
            group = metadata.row_group(row_group)
            size = group.column(text_index).total_uncompressed_size
            parts.append(ParquetPart(file, columns, size, row_group, first_row))
            first_row += group.num_rows
    return parts


def table_parts(file: SourceFile, columns: TableColumns) -> Sequence[TablePart]:
    """Return the parts of a table by its ending; raises DataError if a Parquet file cannot be read."""
    return _PARTS_BY_SUFFIX.get(file.suffix, records_parts)(file, columns)


_PARTS_BY_SUFFIX = {".jsonl": json_lines_parts, ".ndjson": json_lines_parts, ".parquet": parquet_parts}


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        message = "Parquet is read with pyarrow, which is not installed."
        raise DataError(message, "pip install 'memtx[data]'.") from error
    return pyarrow.parquet
