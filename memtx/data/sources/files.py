"""Texts and tables of texts from folders, files and URLs, in the splits that they are laid out in or by a share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from memtx.data.sources import tables
from memtx.data.sources.corpus import METADATA_NAME, TEXT_SUFFIXES, open_corpus, read_titles
from memtx.data.sources.document import SourcePart
from memtx.data.sources.manifest import SPLITS, CorpusManifest, TextSource
from memtx.data.sources.remote_files import COMPRESSION_BY_SUFFIX, RemoteDocument, RemoteFile, list_files, open_file
from memtx.errors import DataError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
BUILTIN_ROOTS = ("embedded", "embedded+sources")

DEFAULT_EVAL_FRACTION = 0.05
"""What validation and test get each, where nothing says which documents are theirs."""

# How others call the splits, in folders and at the beginning of a table's name.
_SPLIT_ALIASES = {**{name: name for name in SPLITS}, "valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_PREFIX = re.compile(rf"({'|'.join(_SPLIT_ALIASES)})(?=[-_.]|$)")


class FileSource(TextSource):
    """Files of texts (``.txt``, ``.md``, ...), lines of JSON (``.jsonl``) and Parquet, anywhere that fsspec reads.

    Splits are as laid out: folders ``train``, ``validation`` and ``test``, or tables named so (``train-0.parquet``).
    Where there are none, or a share is given, documents are dealt by their names. Beside the tables
    of a place, its files of text (a README) are left alone.

    Args:
        paths: paths, patterns with ``*`` or URLs; ``x.zip`` for what is in it; ``.gz`` and its like are uncompressed.
        text_column: of tables, where the text is.
        id_column: of tables, where the document's name is; None for file and place in it.
        validation_fraction: share of documents, by their names; None for as laid out, else 0.05.
        test_fraction: likewise.

    Raises:
        DataError: a share is out of range.
    """

    def __init__(
        self,
        paths: Sequence[str],
        text_column: str = "text",
        id_column: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
    ) -> None:
        self.paths, self.text_column, self.id_column = list(paths), text_column, id_column
        self.split_fractions = compute_split_fractions(validation_fraction, test_fraction)
        self.has_explicit_fractions = validation_fraction is not None or test_fraction is not None

    def scan(self) -> CorpusManifest:
        """List the files."""
        if not self.paths:
            raise DataError("No source of texts is given.", "Name folders, files or URLs.")
        name = self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"
        if (
            len(self.paths) == 1
            and not self.has_explicit_fractions
            and (known := _open_plain_corpus(self.paths[0])) is not None
        ):
            return known
        found: list[RemoteFile] = []
        chosen: list[RemoteFile] = []
        for asked in self.paths:
            own = list_files(asked)
            found += own
            tabled = [one for one in own if one.suffix in JSON_LINES_SUFFIXES + PARQUET_SUFFIXES]
            chosen += tabled or [one for one in own if one.suffix in TEXT_SUFFIXES]
        if not chosen:
            endings = ", ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES))
            raise DataError(f"'{name}' holds no text, expected files ending in {endings}.", "They may be compressed.")
        splits = (
            {}
            if self.has_explicit_fractions
            else {one.url: split for one in chosen if (split := _infer_split(one)) is not None}
        )
        if not splits:
            return CorpusManifest(
                name,
                unsplit_parts=[part for one in chosen for part in self._make_parts(one, {})],
                split_fractions=self.split_fractions,
            )
        titles = _collect_titles(found)
        laid_out: dict[str, list[SourcePart]] = {split: [] for split in SPLITS}
        for one in chosen:
            if one.url in splits:
                laid_out[splits[one.url]] += self._make_parts(one, titles)
        return CorpusManifest(name, laid_out)

    def _make_parts(self, file: RemoteFile, titles: dict[str, str]) -> list[SourcePart]:
        if file.size == 0:
            raise DataError(f"'{file.url}' is empty, expected a text.", "Remove the file or restore its text.")
        if file.suffix in JSON_LINES_SUFFIXES:
            return tables.json_lines_parts(file, self.text_column, self.id_column)
        if file.suffix in PARQUET_SUFFIXES:
            return tables.parquet_parts(file, self.text_column, self.id_column)
        # In the layout of PG-19 a document is called by its file alone.
        name = (
            PurePosixPath(file.name).stem
            if _infer_split(file) is not None and not self.has_explicit_fractions
            else file.name
        )
        return [
            RemoteDocument(
                name,
                titles.get(name, name),
                file.size,
                file.url,
                version=file.version,
                is_process_local=file.is_process_local,
            )
        ]


def compute_split_fractions(validation_fraction: float | None, test_fraction: float | None) -> dict[str, float]:
    """Return what each split gets; raises DataError where a share is out of range."""
    held = {
        "validation": DEFAULT_EVAL_FRACTION if validation_fraction is None else validation_fraction,
        "test": DEFAULT_EVAL_FRACTION if test_fraction is None else test_fraction,
    }
    for name, share in held.items():
        if not 0 <= share < 1:
            raise DataError(f"{name}_fraction is {share}, expected a share from 0 up to 1.", "Give for example 0.01.")
    train = 1 - sum(held.values())
    if train <= 0:
        raise DataError("The shares of validation and test leave nothing to train on.", "Give smaller ones.")
    return {name: share for name, share in {**held, "train": train}.items() if share > 0}


def _open_plain_corpus(root: str) -> CorpusManifest | None:
    """Return the splits that training would make of a folder of plain text files; None where there are others."""
    if root in BUILTIN_ROOTS:
        return CorpusManifest(root, open_corpus(root).splits)
    path = Path(root).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    others = (*JSON_LINES_SUFFIXES, *PARQUET_SUFFIXES, *COMPRESSION_BY_SUFFIX, ".zip")
    if any(one.suffix.lower() in others for one in files):
        return None
    return CorpusManifest(root, open_corpus(path).splits)


def canonical_split(name: str) -> str | None:
    """Return what a split is called here; None for one that is none of the usual ones."""
    return _SPLIT_ALIASES.get(name)


def _infer_split(file: RemoteFile) -> str | None:
    """Return the split that a file's folder says, or a table's name."""
    path = PurePosixPath(file.name)
    for part in path.parts[:-1]:
        if part in _SPLIT_ALIASES:
            return _SPLIT_ALIASES[part]
    found = _SPLIT_PREFIX.match(path.name) if file.suffix in JSON_LINES_SUFFIXES + PARQUET_SUFFIXES else None
    return _SPLIT_ALIASES[found[1]] if found else None


def _collect_titles(files: Sequence[RemoteFile]) -> dict[str, str]:
    titles: dict[str, str] = {}
    for one in files:
        if one.name == METADATA_NAME:
            with open_file(one.url) as handle:
                titles |= read_titles(handle.read())
    return titles
