"""Data sets of Hugging Face's ``datasets`` library, read as a stream; it must be installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memtx.data.sources.document import Document, SourcePart
from memtx.data.sources.files import canonical_split, compute_split_fractions
from memtx.data.sources.manifest import CorpusManifest, TextSource
from memtx.data.sources.tables import row_to_document
from memtx.errors import DataError, MemtxError

DEFAULT_SHARD_BYTES = 64 << 20
"""Bytes that a piece of a data set counts as where nothing says how many there are."""

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True)
class HubShard(SourcePart):
    """One of the pieces that a data set's split is stored in.

    Attributes:
        load_kwargs: of ``datasets.load_dataset``.
        split: the data set's name for it.
        shard_index: of the piece.
        num_shards: pieces of the split.
        size: bytes, as far as they are known.
        version: what changes when the data set does.
        text_column: the column of texts.
        id_column: that of documents' names; None for piece and row.
    """

    load_kwargs: dict[str, Any]
    split: str
    shard_index: int
    num_shards: int
    size: int
    version: str
    text_column: str
    id_column: str | None

    @property
    def cache_key(self) -> str:
        """The data set, its version, and the piece."""
        own = f"{sorted(self.load_kwargs.items())}:{self.split}:{self.shard_index}:{self.num_shards}"
        return f"{own}:{self.version}:{self.text_column}:{self.id_column}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield a document a row."""
        name = f"{self.load_kwargs['path']}/{self.split}-{self.shard_index}"
        try:
            stream = _import_datasets().load_dataset(**self.load_kwargs, split=self.split, streaming=True)
            columns = [self.text_column] if self.id_column is None else [self.text_column, self.id_column]
            piece = stream.shard(num_shards=self.num_shards, index=self.shard_index).select_columns(columns)
            for number, record in enumerate(piece):
                where = f"'{name}', row {number}"
                yield row_to_document(where, record, f"{name}@{number}", self.text_column, self.id_column)
        except MemtxError:
            raise
        except Exception as error:  # its errors are those of every format and network it knows
            raise _read_error(self.load_kwargs["path"], error) from error


class HubDataset(TextSource):
    """A data set of the ``datasets`` library: a name on the hub, a folder, or a kind of files with ``data_files``.

    Its splits are taken where it has train, validation and test; else, or where a share is given, the documents of
    "train" are dealt by their names.

    Args:
        path: as ``datasets.load_dataset`` takes it; no data set's own code is run.
        name: of its configurations.
        data_files: where the files are, for a kind such as ``json``.
        revision: of the data set.
        text_column: the column of texts.
        id_column: that of documents' names; None for place in the data set.
        validation_fraction: share of documents; None for as laid out, else 0.05.
        test_fraction: likewise.

    Raises:
        DataError: a share is out of range.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: DataFiles = None,
        revision: str | None = None,
        text_column: str = "text",
        id_column: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
    ) -> None:
        given = {"path": path, "name": name, "data_files": data_files, "revision": revision}
        self.path = path
        self.load_kwargs = {key: value for key, value in given.items() if value is not None}
        self.text_column, self.id_column = text_column, id_column
        self.split_fractions = compute_split_fractions(validation_fraction, test_fraction)
        self.has_explicit_fractions = validation_fraction is not None or test_fraction is not None

    def scan(self) -> CorpusManifest:
        """Ask the library what there is."""
        path = self.path
        try:
            builder = _import_datasets().load_dataset_builder(**self.load_kwargs)
            streams = _import_datasets().load_dataset(**self.load_kwargs, streaming=True)
        except MemtxError:
            raise
        except Exception as error:  # as above
            raise _read_error(path, error) from error
        pieces = {name: self._make_parts(builder, str(name), stream) for name, stream in streams.items()}
        laid_out = {split: parts for name, parts in pieces.items() if (split := canonical_split(str(name))) is not None}
        if "train" not in laid_out:
            raise DataError(f"The data set '{path}' has no split 'train', it has {', '.join(pieces)}.", "Use another.")
        if self.has_explicit_fractions or len(laid_out) == 1:
            return CorpusManifest(path, unsplit_parts=laid_out["train"], split_fractions=self.split_fractions)
        return CorpusManifest(path, laid_out)

    def _make_parts(self, builder: Any, split: str, stream: Any) -> list[SourcePart]:
        columns = stream.column_names
        for name in (self.text_column, self.id_column):
            if name is not None and columns is not None and name not in columns:
                raise DataError(
                    f"The data set '{self.path}' has no column '{name}', it has {', '.join(columns)}.",
                    "Name the column of the texts.",
                )
        count = stream.num_shards
        known = (builder.info.splits or {}).get(split)
        size = known.num_bytes // count if known is not None and known.num_bytes else DEFAULT_SHARD_BYTES
        files = (builder.config.data_files or {}).get(split)
        version = f"{builder.hash}:{getattr(files, 'origin_metadata', '')}"
        return [
            HubShard(self.load_kwargs, split, index, count, max(1, size), version, self.text_column, self.id_column)
            for index in range(count)
        ]


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("This needs the library 'datasets'.", "pip install datasets.") from error
    return datasets


def _read_error(path: str, error: Exception) -> DataError:
    text = " ".join(str(error).split()).rstrip(".")
    return DataError(f"The data set '{path}' could not be read: {type(error).__name__}: {text}.", "Check its name.")
