"""Texts and tables of texts in folders, files and URLs, in the splits that their names give or by fractions."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from memtx.data.sources.assignment import SplitFractions, assign_parts
from memtx.data.sources.base import SPLITS, CorpusManifest, Document, RemoteDocument, SourcePart, TextSource
from memtx.data.sources.builtin import BUILTIN_ROOTS, builtin_splits
from memtx.data.sources.listing import COMPRESSION_BY_SUFFIX, Listing, SourceFile, list_files, open_file
from memtx.data.sources.splits import TABLE_SUFFIXES, TEXT_SUFFIXES, infer_splits
from memtx.data.sources.tables import TableColumns, table_parts
from memtx.errors import DataError

METADATA_NAME = "metadata.csv"  # of PG-19, with the titles
# Reasons to leave a file out, as messages have them.
OTHER_ENDING, README, NO_SPLIT = "with other endings", "README, licence or metadata", "in no split"
TABLES_BESIDE_TEXTS, TEXTS_BESIDE_TABLES = "tables beside texts", "texts beside tables"

_README = re.compile(
    r"(readme\b.*|(licen[cs]e|copying|notice|changelog|contributing|citation|code_of_conduct)([-_.]\w+)?|"
    r"metadata\.csv|dataset_infos?\.json|dataset_dict\.json)",
    re.IGNORECASE,
)


class FileSource(TextSource):
    """Files of texts (``.txt``, ``.md``, ...), JSON, CSV and Parquet, anywhere that fsspec reads.

    Names of folders and files give the splits: train, training; validation, valid, val, dev, eval; test, also inside
    names such as ``wiki.train.tokens`` or ``train-00000-of-00003.parquet``. If none is named train, the files without a
    split are the training texts, else they are left out. Without such names, documents are assigned by their ids, or
    each of fewer than 10 is cut. Of a folder with texts and tables the larger kind is read. The manifest's ``notes``
    name what is left out. Raises DataError if a fraction is out of range.

    Args:
        paths: Paths, patterns with ``*`` or URLs. ``x.zip`` stands for its content; ``.gz``, ``.bz2``, ``.xz`` and
            ``.zst`` are decompressed.
        text_column: Column of the texts in tables. Defaults to "text".
        id_column: Column of the document ids in tables. None uses the file and the row's position.
        validation_fraction: Fraction of the documents of train and validation, chosen by their ids. None keeps the
            named splits, or takes 0.05 if there are none.
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
        self.columns = TableColumns(text_column, id_column)
        self.fractions = SplitFractions(validation_fraction, test_fraction)
        self.paths = list(paths)

    def scan(self) -> CorpusManifest:
        """List the files."""
        return scan_files(self.paths, self.columns, self.fractions)


def is_table(path: str) -> bool:
    """Return whether the name of a file, compressed or not, has the ending of a table."""
    name = PurePosixPath(path.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSION_BY_SUFFIX else name).suffix in TABLE_SUFFIXES


def scan_files(paths: Sequence[str], columns: TableColumns, fractions: SplitFractions) -> CorpusManifest:
    """List the texts and tables of paths; see :class:`FileSource`. Raises DataError if there are none."""
    if not paths:
        raise DataError("No source of texts is given.", "Name folders, files or URLs.")
    if len(paths) == 1 and paths[0] in BUILTIN_ROOTS:
        builtin = builtin_splits(include_stdlib=paths[0].endswith("sources"))
        return assign_parts(paths[0], builtin, [], fractions, {})
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    seen: set[str] = set()
    listings = [list_files(path, seen) for path in paths]
    titles: dict[str, str] = {}
    for listing in listings:
        titles |= _choose_files(listing)
    if not any(listing.files for listing in listings):
        notes = CorpusManifest(name, left_out=_merge_left_out(listings)).notes
        message = f"'{name}' holds no text, expected files ending in {', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))}."
        raise DataError(" ".join([message, *notes]), "They may be compressed.")
    entries, note = _assign_files(name, listings)
    split_parts: dict[str, list[SourcePart]] = {split: [] for split in SPLITS}
    unsplit_parts: list[SourcePart] = []
    is_layout = not fractions.explicit and any(split for split, _, _ in entries)
    for split in (*SPLITS, None):
        files = [(listing, file) for file_split, listing, file in entries if file_split == split]
        parts: list[SourcePart] = unsplit_parts if split is None else split_parts[split]
        for (_, file), document_id in zip(files, _make_ids(files, by_stem=is_layout), strict=True):
            if file.size == 0:
                raise DataError(f"'{file.url}' is empty, expected a text.", "Remove the file or restore its text.")
            if file.suffix in TABLE_SUFFIXES:
                parts.extend(table_parts(replace(file, name=document_id), columns))
            else:
                parts.append(_make_document(file, document_id, titles.get(document_id, document_id)))
    named = {split: parts for split, parts in split_parts.items() if parts}
    manifest = assign_parts(name, named, unsplit_parts, fractions, _merge_left_out(listings))
    return manifest if manifest.assignment else replace(manifest, assignment=note)


def _merge_left_out(listings: Sequence[Listing]) -> dict[str, list[str]]:
    left_out: dict[str, list[str]] = {}
    for listing in listings:
        for reason, files in listing.left_out.items():
            left_out.setdefault(reason, []).extend(files)
    return left_out


def _choose_files(listing: Listing) -> dict[str, str]:
    """Keep the texts of a folder, or its tables, and return the titles in its metadata."""
    titles: dict[str, str] = {}
    if listing.is_file:
        return titles
    texts, tables = list[SourceFile](), list[SourceFile]()
    for file in listing.files:
        name = PurePosixPath(file.name)
        if file.name == METADATA_NAME:
            with open_file(file.url) as stream:
                titles = read_titles(stream.read())
        elif _README.fullmatch(name.name if name.suffix.lower() in TABLE_SUFFIXES else name.stem):
            listing.leave_out(README, file.url)
        elif file.suffix in TEXT_SUFFIXES:
            texts.append(file)
        elif file.suffix in TABLE_SUFFIXES:
            tables.append(file)
        else:
            listing.leave_out(OTHER_ENDING, file.url)
    listing.files = texts or tables
    if texts and tables:
        splits = infer_splits([file.name for file in (*texts, *tables)])
        scores = [(any(splits[: len(texts)]), sum(file.size for file in texts))]
        scores.append((any(splits[len(texts) :]), sum(file.size for file in tables)))
        reason, others = TABLES_BESIDE_TEXTS, tables
        if scores[1] > scores[0]:
            listing.files, reason, others = tables, TEXTS_BESIDE_TABLES, texts
        for file in others:
            listing.leave_out(reason, file.url)
    return titles


def read_titles(raw: bytes) -> dict[str, str]:
    """Return the titles by id in the bytes of PG-19's metadata.csv."""
    text = raw.decode("utf-8-sig", errors="replace")
    return {row[0]: row[1] for row in csv.reader(io.StringIO(text, newline="")) if len(row) > 1}


def _assign_files(name: str, listings: Sequence[Listing]) -> tuple[list[tuple[str | None, Listing, SourceFile]], str]:
    """Return the files with the splits that their names give, and a sentence about those that are in none."""
    pairs = [(listing, file) for listing in listings for file in listing.files]
    if len(listings) == 1 and listings[0].is_file:
        return [(None, *pair) for pair in pairs], ""  # one file is all there is, whatever its name
    # The folder itself has a name among others only.
    prefixes = {id(listing): f"{listing.label}/" for listing in listings if len(listings) > 1 and not listing.is_file}
    splits = infer_splits([prefixes.get(id(listing), "") + file.name for listing, file in pairs])
    entries = [(split, *pair) for split, pair in zip(splits, pairs, strict=True)]
    if not any(splits) or all(splits):
        return entries, ""
    if "train" not in splits:
        count = splits.count(None)
        note = f"'{name}': no file is named train, so the {count:,} files in no split are the training texts."
        return [(split or "train", listing, file) for split, listing, file in entries], note
    named = {id(listing) for split, listing, _ in entries if split is not None}
    for split, listing, file in entries:
        if split is None and id(listing) in named:
            listing.leave_out(NO_SPLIT, file.url)
    # What was named in the request itself is not left out.
    return [
        (split or "train", listing, file)
        for split, listing, file in entries
        if split is not None or id(listing) not in named
    ], ""


def _make_ids(files: Sequence[tuple[Listing, SourceFile]], *, by_stem: bool) -> list[str]:
    """Return the shortest of stem (if ``by_stem``), path and path in the request that no other file has."""
    levels = [
        [file.name for _, file in files],
        [f"{listing.label}/{file.name}" for listing, file in files],
        [f"{listing.path}/{file.name}" for listing, file in files],
    ]
    if by_stem:  # in the PG-19 layout a document is named after its file alone
        stems = [name if is_table(name) else PurePosixPath(name).stem for name in levels[0]]
        levels.insert(0, stems)
    ids = levels[0]
    for level in levels[1:]:
        counts = Counter(ids)
        ids = [label if counts[label] == 1 else longer for label, longer in zip(ids, level, strict=True)]
    return ids


def _make_document(file: SourceFile, document_id: str, title: str) -> Document:
    if file.is_plain:
        return Document(document_id, title, file.size, file.url)
    local = file.is_process_local
    return RemoteDocument(document_id, title, file.size, file.url, version=file.version, is_process_local=local)
