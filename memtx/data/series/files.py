"""Files of series: CSV, converted once to a memory-mapped array, and NumPy arrays, mapped where they are."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.series.schema import find_columns
from memtx.errors import DataError

CSV_SUFFIXES, NUMPY_SUFFIX = (".csv", ".tsv"), ".npy"
CONVERSION_VERSION = 1
CHUNK_VALUES = 1 << 16
"""Values that are parsed, written or scanned at once."""

FILL_HINT = "Fill the gap or cut the series there; or name columns without gaps by data.columns."


def is_series_file(path: Path) -> bool:
    """Return whether a file has the ending of a series."""
    return path.suffix.lower() in (*CSV_SUFFIXES, NUMPY_SUFFIX)


def read_column_names(path: Path) -> tuple[str, ...]:
    """Return the names of a file's columns; those of a NumPy array are "0", "1" and so on, or its field names."""
    if path.suffix.lower() == NUMPY_SUFFIX:
        return _numpy_names(_load_numpy(path))
    with path.open("rb") as stream:
        return CSVReader(stream, str(path)).names


def open_columns(path: Path, names: tuple[str, ...], cache_dir: Path) -> NDArray[Any]:
    """Return the named columns of a file, ``(steps, columns)``, memory-mapped.

    Raises DataError if the file is no series, lacks a column, or has a value that is no finite number.
    """
    if path.suffix.lower() == NUMPY_SUFFIX:
        values = _load_numpy(path)
        index = find_columns(names, _numpy_names(values), str(path))
        if values.dtype.names is not None:
            return np.stack([values[name] for name in names], axis=-1)
        values = values[:, None] if values.ndim == 1 else values
        is_range = index == list(range(index[0], index[0] + len(index)))
        # Any other choice is copied into memory.
        return values[:, index[0] : index[0] + len(index)] if is_range else values[:, index]
    stat = path.stat()
    key = f"{CONVERSION_VERSION}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{names}"
    target = cache_dir / f"series-{hashlib.sha256(key.encode()).hexdigest()[:32]}.f64"
    if not target.is_file():
        with path.open("rb") as stream, files.atomic_open(target) as output:
            reader = CSVReader(stream, str(path))
            index = find_columns(names, reader.names, str(path))
            buffer = array("d")
            for values_of_line in reader.iter_values(index):
                buffer.extend(values_of_line)
                if len(buffer) >= CHUNK_VALUES:
                    output.write(buffer.tobytes())
                    del buffer[:]
            output.write(buffer.tobytes())
            if not reader.num_steps:
                raise DataError(f"'{path}' has a header and no values.", "Remove the file or restore its values.")
    mapped: NDArray[Any] = np.memmap(target, dtype=np.float64, mode="r")
    return mapped.reshape(-1, len(names))


class CSVReader:
    """Reads the lines of a CSV file, with a header of names.

    Raises DataError for a file without one, that is not UTF-8, or empty.

    Args:
        stream: Bytes of the file.
        path: Its path, for messages; a name ending in .tsv is separated by tabs.
    """

    def __init__(self, stream: IO[bytes], path: str) -> None:
        self.path, self.num_steps = path, 0
        delimiter = "\t" if path.lower().endswith(".tsv") else ","
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        # Strict, so that an unclosed quote does not swallow the rest of the file.
        self._reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(self._lines(), None)
        if header is None:
            raise DataError(f"'{path}' is empty.", "Give a CSV file with a line of column names.")
        self.names = tuple(name.strip() for name in header)
        if all(_is_number(name) for name in self.names):
            message = f"'{path}' begins with numbers, expected the names of its columns."
            raise DataError(message, "Add a line of names; separate them by commas, or by tabs in a .tsv file.")
        repeated = next((name for name in self.names if self.names.count(name) > 1), None)
        if repeated is not None:
            raise DataError(f"'{path}' has two columns named '{repeated}'.", "Rename one of them.")

    def _lines(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except UnicodeDecodeError as error:
            raise DataError(f"'{self.path}' is not UTF-8 ({error.reason}).", "Convert it to UTF-8.") from error
        except csv.Error as error:
            raise DataError(f"'{self.path}', line {self._reader.line_num}: {error}.", "Repair the line.") from error

    def iter_values(self, index: Iterable[int]) -> Iterator[list[float]]:
        """Yield the values of the columns at ``index`` in each line; raises DataError for a line that has others."""
        index, blank_line = list(index), 0
        for line in self._lines():
            number = self._reader.line_num
            if not line:
                blank_line = blank_line or number
                continue
            if blank_line:  # several at the end of a file are no gap
                raise DataError(f"'{self.path}', line {blank_line} is blank.", FILL_HINT)
            if len(line) != len(self.names):
                message = f"'{self.path}', line {number} has {len(line)} fields, the header {len(self.names)}."
                raise DataError(message, "Repair the line.")
            self.num_steps += 1
            yield [self._parse(line[column], column, number) for column in index]

    def _parse(self, text: str, column: int, line: int) -> float:
        if _is_number(text) and math.isfinite(value := float(text)):
            return value
        location = f"'{self.path}', line {line}, column '{self.names[column]}'"
        text = text.strip()
        if not text or text.lower() in ("nan", "na", "null", "none"):
            raise DataError(f"{location}: the value is missing{f' ({text})' if text else ''}.", FILL_HINT)
        if _is_number(text):
            raise DataError(f"{location}: {text} is not finite.", FILL_HINT)
        names = ",".join(name for name in self.names if name != self.names[column])
        hint = f"Name the columns of numbers by data.columns, such as [{names}], or repair the value."
        raise DataError(f"{location}: '{text[:40]}' is not a number.", hint)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which Python allows between digits


def _load_numpy(path: Path) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        message = f"'{path}' is not an array of numbers ({error})."
        raise DataError(message, "Save it with numpy.save, all steps of equal width.") from error
    kinds = {values.dtype[name].kind for name in values.dtype.names} if values.dtype.names else {values.dtype.kind}
    expected_dims = (1,) if values.dtype.names else (1, 2)
    if not kinds <= set("fiub") or values.ndim not in expected_dims or not values.size:
        message = f"'{path}' is {values.dtype} {values.shape}, expected numbers (steps, columns)."
        raise DataError(message, "Save one series per file, of at least one step.")
    return values


def _numpy_names(values: NDArray[Any]) -> tuple[str, ...]:
    if values.dtype.names is not None:
        return tuple(values.dtype.names)
    return tuple(map(str, range(1 if values.ndim == 1 else values.shape[1])))
