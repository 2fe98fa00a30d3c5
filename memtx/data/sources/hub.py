"""Datasets of Hugging Face's ``datasets`` library, read as a stream; the library must be installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from memtx.data.sources.assignment import SplitFractions, assign_parts
from memtx.data.sources.base import CorpusManifest, Document, SourcePart, TextSource
from memtx.data.sources.listing import convert_errors
from memtx.data.sources.splits import infer_splits
from memtx.data.sources.tables import TableColumns
from memtx.errors import DataError

DEFAULT_SHARD_BYTES = 64 << 20  # assumed bytes of a shard, if the dataset does not say

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True)
class HubShard(SourcePart):
    """One of the shards that a split of a dataset is stored in."""

    load_kwargs: dict[str, Any]  # of `datasets.load_dataset`
    split: str  # as the dataset names it
    shard_index: int
    num_shards: int
    size: int  # bytes, as far as they are known
    version: str  # text that changes when the dataset does
    columns: TableColumns

    @property
    def cache_key(self) -> str:
        """The dataset, its version, and the shard."""
        shard = f"{self.split}:{self.shard_index}:{self.num_shards}"
        return f"{sorted(self.load_kwargs.items())}:{shard}:{self.version}:{self.columns.text}:{self.columns.id}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield one document a row."""
        name = f"{self.load_kwargs['path']}/{self.split}-{self.shard_index}"
        with _convert_errors(self.load_kwargs["path"]):
            stream = _import_datasets().load_dataset(**self.load_kwargs, split=self.split, streaming=True)
            shard = stream.shard(num_shards=self.num_shards, index=self.shard_index).select_columns(self.columns.names)
            for row, record in enumerate(shard):
                yield self.columns.to_document(f"'{name}', row {row}", record, f"{name}@{row}")


class HubDataset(TextSource):
    """A dataset of the ``datasets`` library: a name on the hub, a folder, or a builder such as ``json`` with files.

    The names of its splits are read as those of files (see :class:`memtx.data.sources.files.FileSource`); one without a
    name of ours is left out, as the manifest's ``notes`` say. If it has "train" alone, its documents are assigned to
    splits by their ids. Raises DataError if a fraction is out of range.

    Args:
        path: As ``datasets.load_dataset`` takes it; no code of the dataset is run.
        name: Configuration of the dataset.
        data_files: Files for a builder such as ``json``.
        revision: Revision of the dataset.
        text_column: Column of the texts. Defaults to "text".
        id_column: Column of the document ids. None uses the row's position in the dataset.
        validation_fraction: Fraction of the documents of train and validation, chosen by their ids. None keeps the
            dataset's splits, or takes 0.05 if it has "train" alone.
        test_fraction: The same for the test split.
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
        self.columns = TableColumns(text_column, id_column)
        self.fractions = SplitFractions(validation_fraction, test_fraction)
        load_kwargs = {"path": path, "name": name, "data_files": data_files, "revision": revision}
        self.path = path
        self.load_kwargs = {key: value for key, value in load_kwargs.items() if value is not None}

    def scan(self) -> CorpusManifest:
        """List the shards of the dataset's splits."""
        datasets = _import_datasets()
        with _convert_errors(self.path):
            builder = datasets.load_dataset_builder(**self.load_kwargs)
            streams = datasets.load_dataset(**self.load_kwargs, streaming=True)
        shards = {str(split): self._make_parts(builder, str(split), stream) for split, stream in streams.items()}
        split_parts: dict[str, list[SourcePart]] = {}
        left_out: list[str] = []
        for (name, parts), split in zip(shards.items(), infer_splits(list(shards)), strict=True):
            if split is None:
                left_out.append(name)
            else:
                split_parts.setdefault(split, []).extend(parts)
        if "train" not in split_parts:
            message = f"The dataset '{self.path}' has no split 'train', it has {', '.join(shards)}."
            raise DataError(message, "Use another dataset.")
        has_splits = len(split_parts) > 1
        unsplit_parts = [] if has_splits else split_parts.pop("train")
        reasons = {"splits of other names": left_out} if left_out else {}
        return assign_parts(self.path, split_parts, unsplit_parts, self.fractions, reasons)

    def _make_parts(self, builder: Any, split: str, stream: Any) -> list[HubShard]:
        if stream.column_names is not None:
            self.columns.check(stream.column_names, f"The dataset '{self.path}'")
        info = (builder.info.splits or {}).get(split)
        count, num_bytes = stream.num_shards, info.num_bytes if info is not None else None
        size = max(1, num_bytes // count) if num_bytes else DEFAULT_SHARD_BYTES
        files = (builder.config.data_files or {}).get(split)
        version = f"{builder.hash}:{getattr(files, 'origin_metadata', '')}"
        return [HubShard(self.load_kwargs, split, i, count, size, version, self.columns) for i in range(count)]


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("This source needs the library 'datasets'.", "pip install datasets.") from error
    return datasets


def _convert_errors(path: str) -> AbstractContextManager[None]:
    return convert_errors(f"The dataset '{path}' could not be read", "Check its name.")
