"""Tables of texts, one document a row: JSON lines and Parquet. Memory holds one text at a time, or a few."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from memtx.data.sources.base import READ_SIZE, Document, RemoteFile, SourcePart, TextSource, open_file
from memtx.data.text_chunks import encode_utf8
from memtx.errors import DataError, MemtxError, closest_match

BLOCK_BYTES = 8 << 20  # of a part of a JSON lines file
MAX_LINE_BYTES = 128 << 20  # a line is parsed as a whole
PARQUET_BATCH_SIZE = 16  # rows in memory
DEFAULT_EVAL_FRACTION = 0.05  # of the documents for each of validation and test, if a source has no splits


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
                raise DataError(message, f"Name another column with {option}.")

    def to_document(self, location: str, record: Mapping[str, Any], default_id: str) -> Document:
        """Return the document of a row; messages name its ``location``, and ``default_id`` is for tables without ids.

        Raises DataError if a column is missing, or holds no text or no id.
        """
        hint = "Name the column of the texts with --text-column."
        if self.text not in record:
            match = closest_match(self.text, map(str, record))
            raise DataError(f"{location}: there is no '{self.text}'.{match}", hint)
        text = "" if record[self.text] is None else record[self.text]
        if not isinstance(text, str):
            raise DataError(f"{location}: '{self.text}' is a {type(text).__name__}, expected a text.", hint)
        document_id = default_id if self.id is None else record.get(self.id)
        if document_id is None or isinstance(document_id, dict | list):
            raise DataError(f"{location}: there is no id in '{self.id}'.", "Name another column with --id-column.")
        document_id = str(document_id)
        try:
            encode_utf8(document_id)
            return Document(document_id, document_id, len(encode_utf8(text)), text=text, is_table_row=True)
        except MemtxError as error:
            raise DataError(f"{location}: {error.message}", error.hint) from error


class TableSource(TextSource):
    """Base of sources that may hold tables and may be split by fractions; see :class:`FileSource`."""

    def __init__(self, columns: TableColumns, validation_fraction: float | None, test_fraction: float | None) -> None:
        self.columns = columns
        self.has_explicit_fractions = validation_fraction is not None or test_fraction is not None
        requested = {"validation": validation_fraction, "test": test_fraction}
        fractions = {split: DEFAULT_EVAL_FRACTION if value is None else value for split, value in requested.items()}
        for split, fraction in fractions.items():
            if not 0 <= fraction < 1:
                message = f"{split}_fraction is {fraction}, expected a share from 0 up to 1."
                raise DataError(message, "Give for example 0.01.")
        fractions["train"] = 1 - sum(fractions.values())
        if fractions["train"] <= 0:
            message = f"The shares validation_fraction and test_fraction add up to {1 - fractions['train']}."
            raise DataError(message, "Give smaller ones, so that some documents are left to train on.")
        self.split_fractions = {split: fraction for split, fraction in fractions.items() if fraction > 0}


@dataclass(frozen=True)
class TablePart(SourcePart):
    """Some rows of a file; ``size`` is their bytes."""

    file: RemoteFile
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
                    record = _parse_line(line, f"'{url}', byte {offset}", is_first=offset == 0)
                    yield self._to_document("byte", offset, record)


def _parse_line(line: bytes, location: str, *, is_first: bool) -> Mapping[str, Any]:
    hint = "Every line must be a JSON object in UTF-8."
    try:
        record = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: the line is no JSON: {error}.", hint) from error
    if not isinstance(record, dict):
        raise DataError(f"{location}: the line is a {type(record).__name__}, expected a JSON object.", hint)
    return record


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


def json_lines_parts(file: RemoteFile, columns: TableColumns) -> list[TablePart]:
    """Return the parts of a file of JSON objects, one a line; a compressed file is one part."""
    if not file.is_seekable:
        return [JsonLinesPart(file, columns, file.size, 0, None)]
    ranges = [(start, min(start + BLOCK_BYTES, file.size)) for start in range(0, file.size, BLOCK_BYTES)]
    return [JsonLinesPart(file, columns, stop - start, start, stop) for start, stop in ranges]


def parquet_parts(file: RemoteFile, columns: TableColumns) -> list[TablePart]:
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


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        message = "Parquet is read with pyarrow, which is not installed."
        raise DataError(message, "pip install 'memtx[data]'.") from error
    return pyarrow.parquet
