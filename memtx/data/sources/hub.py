"""Data sets of Hugging Face's ``datasets`` library, read as a stream; it must be installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memtx.data.document import Document, Part
from memtx.data.source import Source, Texts
from memtx.data.sources.files import shares, usual
from memtx.data.sources.tables import document_of
from memtx.errors import DataError, MemtxError

UNKNOWN = 64 << 20
"""Bytes that a piece of a data set counts as where nothing says how many there are."""

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True)
class Piece(Part):
    """One of the pieces that a data set's split is stored in.

    Attributes:
        arguments: of ``datasets.load_dataset``.
        split: the data set's name for it.
        index: of the piece.
        count: pieces of the split.
        size: bytes, as far as they are known.
        version: what changes when the data set does.
        field: the column of texts.
        id_field: that of documents' names; None for piece and row.
    """

    arguments: dict[str, Any]
    split: str
    index: int
    count: int
    size: int
    version: str
    field: str
    id_field: str | None

    @property
    def stamp(self) -> str:
        """The data set, its version, and the piece."""
        own = f"{sorted(self.arguments.items())}:{self.split}:{self.index}:{self.count}"
        return f"{own}:{self.version}:{self.field}:{self.id_field}"

    def documents(self) -> Iterator[Document]:
        """Yield a document a row."""
        name = f"{self.arguments['path']}/{self.split}-{self.index}"
        try:
            stream = _library().load_dataset(**self.arguments, split=self.split, streaming=True)
            columns = [self.field] if self.id_field is None else [self.field, self.id_field]
            piece = stream.shard(num_shards=self.count, index=self.index).select_columns(columns)
            for number, record in enumerate(piece):
                where = f"'{name}', row {number}"
                yield document_of(where, record, f"{name}@{number}", self.field, self.id_field)
        except MemtxError:
            raise
        except Exception as error:  # its errors are those of every format and network it knows
            raise _failed(self.arguments["path"], error) from error


class HubDataset(Texts):
    """A data set of the ``datasets`` library: a name on the hub, a folder, or a kind of files with ``data_files``.

    Its splits are taken where it has train, validation and test; else, or where a share is given, the documents of
    "train" are dealt by their names.

    Args:
        path: as ``datasets.load_dataset`` takes it; no data set's own code is run.
        name: of its configurations.
        data_files: where the files are, for a kind such as ``json``.
        revision: of the data set.
        field: the column of texts.
        id_field: that of documents' names; None for place in the data set.
        validation: share of documents; None for as laid out, else 0.05.
        test: likewise.

    Raises:
        DataError: a share is out of range.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: DataFiles = None,
        revision: str | None = None,
        field: str = "text",
        id_field: str | None = None,
        validation: float | None = None,
        test: float | None = None,
    ) -> None:
        given = {"path": path, "name": name, "data_files": data_files, "revision": revision}
        self.path = path
        self.arguments = {key: value for key, value in given.items() if value is not None}
        self.field, self.id_field = field, id_field
        self.shares = shares(validation, test)
        self.stated = validation is not None or test is not None

    def source(self) -> Source:
        """Ask the library what there is."""
        path = self.path
        try:
            builder = _library().load_dataset_builder(**self.arguments)
            streams = _library().load_dataset(**self.arguments, streaming=True)
        except MemtxError:
            raise
        except Exception as error:  # as above
            raise _failed(path, error) from error
        pieces = {name: self._pieces(builder, str(name), stream) for name, stream in streams.items()}
        laid_out = {split: parts for name, parts in pieces.items() if (split := usual(str(name))) is not None}
        if "train" not in laid_out:
            raise DataError(f"The data set '{path}' has no split 'train', it has {', '.join(pieces)}.", "Use another.")
        if self.stated or len(laid_out) == 1:
            return Source(path, mixed=laid_out["train"], shares=self.shares)
        return Source(path, laid_out)

    def _pieces(self, builder: Any, split: str, stream: Any) -> list[Part]:
        columns = stream.column_names
        for name in (self.field, self.id_field):
            if name is not None and columns is not None and name not in columns:
                raise DataError(
                    f"The data set '{self.path}' has no column '{name}', it has {', '.join(columns)}.",
                    "Name the column of the texts.",
                )
        count = stream.num_shards
        known = (builder.info.splits or {}).get(split)
        size = known.num_bytes // count if known is not None and known.num_bytes else UNKNOWN
        files = (builder.config.data_files or {}).get(split)
        version = f"{builder.hash}:{getattr(files, 'origin_metadata', '')}"
        return [
            Piece(self.arguments, split, index, count, max(1, size), version, self.field, self.id_field)
            for index in range(count)
        ]


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("This needs the library 'datasets'.", "pip install datasets.") from error
    return datasets


def _failed(path: str, error: Exception) -> DataError:
    text = " ".join(str(error).split()).rstrip(".")
    return DataError(f"The data set '{path}' could not be read: {type(error).__name__}: {text}.", "Check its name.")
