"""Texts and tables of texts in folders, files and URLs, with the splits of their layout or split by fractions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from memtx.data.sources.base import (
    COMPRESSION_BY_SUFFIX,
    SPLIT_ALIASES,
    SPLITS,
    CorpusManifest,
    RemoteDocument,
    RemoteFile,
    SourcePart,
    list_files,
    open_file,
)
from memtx.data.sources.corpus import BUILTIN_ROOTS, METADATA_NAME, TEXT_SUFFIXES, open_corpus, read_titles
from memtx.data.sources.tables import TableColumns, TableSource, json_lines_parts, parquet_parts
from memtx.errors import DataError

TABLE_PARTS = {".jsonl": json_lines_parts, ".ndjson": json_lines_parts, ".parquet": parquet_parts}

_SPLIT_PREFIX = re.compile(rf"({'|'.join(SPLIT_ALIASES)})(?=[-_.]|$)")


class FileSource(TableSource):
    """Files of texts (``.txt``, ``.md``, ...), JSON lines (``.jsonl``) and Parquet, anywhere that fsspec reads.

    Splits follow the layout: folders ``train``, ``validation`` and ``test``, or tables named so (``train-0.parquet``).
    Without such a layout, or if a fraction is given, documents are assigned to splits by their ids. Text files beside
    tables (a README) are ignored. Raises DataError if a fraction is out of range.

    Args:
        paths: Paths, patterns with ``*`` or URLs. ``x.zip`` stands for its content; ``.gz``, ``.bz2``, ``.xz`` and
            ``.zst`` are decompressed.
        text_column: Column of the texts in tables. Defaults to "text".
        id_column: Column of the document ids in tables. None uses the file and the row's position.
        validation_fraction: Fraction of the documents, chosen by their ids. None keeps the layout, or takes 0.05 if
            there is none.
        test_fraction: The same for the test split.
    """

    def __init__(
        self,
        paths: Sequence[str],
        text_column: str = "text",
        id_column: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
    ) -> None:
        super().__init__(TableColumns(text_column, id_column), validation_fraction, test_fraction)
        self.paths = list(paths)

    def scan(self) -> CorpusManifest:
        """List the files."""
        if not self.paths:
            raise DataError("No source of texts is given.", "Name folders, files or URLs.")
        name = self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
        if len(self.paths) == 1 and not self.has_explicit_fractions and _is_plain_corpus(self.paths[0]):
            return open_corpus(self.paths[0])
        listed, chosen = list[RemoteFile](), list[RemoteFile]()
        for path in self.paths:
            files = list_files(path)
            listed += files
            tables = [file for file in files if file.suffix in TABLE_PARTS]
            chosen += tables or [file for file in files if file.suffix in TEXT_SUFFIXES]
        if not chosen:
            suffixes = ", ".join((*TEXT_SUFFIXES, *TABLE_PARTS))
            raise DataError(f"'{name}' holds no text, expected files ending in {suffixes}.", "They may be compressed.")
        splits = {} if self.has_explicit_fractions else {file.url: _infer_split(file) for file in chosen}
        if not any(splits.values()):
            parts = [part for file in chosen for part in self._make_parts(file, None, {})]
            return CorpusManifest(name, unsplit_parts=parts, split_fractions=self.split_fractions)
        titles: dict[str, str] = {}
        for file in listed:
            if file.name == METADATA_NAME:
                with open_file(file.url) as stream:
                    titles |= read_titles(stream.read())
        split_parts: dict[str, list[SourcePart]] = {split: [] for split in SPLITS}
        for file in chosen:
            if split := splits[file.url]:
                split_parts[split] += self._make_parts(file, split, titles)
        return CorpusManifest(name, split_parts)

    def _make_parts(self, file: RemoteFile, split: str | None, titles: dict[str, str]) -> Sequence[SourcePart]:
        if file.size == 0:
            raise DataError(f"'{file.url}' is empty, expected a text.", "Remove the file or restore its text.")
        if make_parts := TABLE_PARTS.get(file.suffix):
            return make_parts(file, self.columns)
        # In the PG-19 layout a document is named after its file alone.
        document_id = PurePosixPath(file.name).stem if split else file.name
        title = titles.get(document_id, document_id)
        local = file.is_process_local
        return [RemoteDocument(document_id, title, file.size, file.url, version=file.version, is_process_local=local)]


def _is_plain_corpus(root: str) -> bool:
    """Return True for a local file or folder without tables and archives, which training reads as it is."""
    if root in BUILTIN_ROOTS:
        return True
    path = Path(root).expanduser()
    files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
    suffixes = (*TABLE_PARTS, *COMPRESSION_BY_SUFFIX, ".zip")
    return path.exists() and not any(file.suffix.lower() in suffixes for file in files)


def _infer_split(file: RemoteFile) -> str | None:
    """Return the split that a folder of the file's path names, or the name of a table."""
    path = PurePosixPath(file.name)
    for part in path.parts[:-1]:
        if part in SPLIT_ALIASES:
            return SPLIT_ALIASES[part]
    match = _SPLIT_PREFIX.match(path.name) if file.suffix in TABLE_PARTS else None
    return SPLIT_ALIASES[match[1]] if match else None
