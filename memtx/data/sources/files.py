"""Texts and tables of texts from folders, files and URLs, in the splits that they are laid out in or by a share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from memtx.data.document import Part
from memtx.data.documents import METADATA, SUFFIXES, open_corpus, read_titles
from memtx.data.source import SPLITS, Source, Texts
from memtx.data.sources import tables
from memtx.data.sources.places import COMPRESSED, Place, StoredText, listed, opened
from memtx.errors import DataError

LINES = (".jsonl", ".ndjson")
ROWS = (".parquet",)
EMBEDDED = ("embedded", "embedded+sources")

SHARE = 0.05
"""What validation and test get each, where nothing says which documents are theirs."""

# How others call the splits, in folders and at the beginning of a table's name.
_NAMES = {**{name: name for name in SPLITS}, "valid": "validation", "val": "validation", "dev": "validation"}
_TABLE = re.compile(rf"({'|'.join(_NAMES)})(?=[-_.]|$)")


class Files(Texts):
    """Files of texts (``.txt``, ``.md``, ...), lines of JSON (``.jsonl``) and Parquet, anywhere that fsspec reads.

    Splits are as laid out: folders ``train``, ``validation`` and ``test``, or tables named so (``train-0.parquet``).
    Where there are none, or a share is given, documents are dealt by their names. Beside the tables
    of a place, its files of text (a README) are left alone.

    Args:
        places: paths, patterns with ``*`` or URLs; ``x.zip`` for what is in it; ``.gz`` and its like are uncompressed.
        field: of tables, where the text is.
        id_field: of tables, where the document's name is; None for file and place in it.
        validation: share of documents, by their names; None for as laid out, else 0.05.
        test: likewise.

    Raises:
        DataError: a share is out of range.
    """

    def __init__(
        self,
        places: Sequence[str],
        field: str = "text",
        id_field: str | None = None,
        validation: float | None = None,
        test: float | None = None,
    ) -> None:
        self.places, self.field, self.id_field = list(places), field, id_field
        self.shares = shares(validation, test)
        self.stated = validation is not None or test is not None

    def source(self) -> Source:
        """List the files."""
        if not self.places:
            raise DataError("No source of texts is given.", "Name folders, files or URLs.")
        name = self.places[0] if len(self.places) == 1 else f"{self.places[0]} and {len(self.places) - 1} more"
        if len(self.places) == 1 and not self.stated and (known := _as_in_training(self.places[0])) is not None:
            return known
        found: list[Place] = []
        chosen: list[Place] = []
        for asked in self.places:
            own = listed(asked)
            found += own
            tabled = [one for one in own if one.suffix in LINES + ROWS]
            chosen += tabled or [one for one in own if one.suffix in SUFFIXES]
        if not chosen:
            endings = ", ".join((*SUFFIXES, *LINES, *ROWS))
            raise DataError(f"'{name}' holds no text, expected files ending in {endings}.", "They may be compressed.")
        splits = {} if self.stated else {one.url: split for one in chosen if (split := _split(one)) is not None}
        if not splits:
            return Source(name, mixed=[part for one in chosen for part in self._parts(one, {})], shares=self.shares)
        titles = _titles(found)
        laid_out: dict[str, list[Part]] = {split: [] for split in SPLITS}
        for one in chosen:
            if one.url in splits:
                laid_out[splits[one.url]] += self._parts(one, titles)
        return Source(name, laid_out)

    def _parts(self, place: Place, titles: dict[str, str]) -> list[Part]:
        if place.size == 0:
            raise DataError(f"'{place.url}' is empty, expected a text.", "Remove the file or restore its text.")
        if place.suffix in LINES:
            return tables.lines(place, self.field, self.id_field)
        if place.suffix in ROWS:
            return tables.rows(place, self.field, self.id_field)
        # In the layout of PG-19 a document is called by its file alone.
        name = PurePosixPath(place.name).stem if _split(place) is not None and not self.stated else place.name
        return [StoredText(name, titles.get(name, name), place.size, place.url, version=place.version, here=place.here)]


def shares(validation: float | None, test: float | None) -> dict[str, float]:
    """Return what each split gets; raises DataError where a share is out of range."""
    held = {"validation": SHARE if validation is None else validation, "test": SHARE if test is None else test}
    for name, share in held.items():
        if not 0 <= share < 1:
            raise DataError(f"{name} is {share}, expected a share from 0 up to 1.", "Give for example 0.01.")
    train = 1 - sum(held.values())
    if train <= 0:
        raise DataError("The shares of validation and test leave nothing to train on.", "Give smaller ones.")
    return {name: share for name, share in {**held, "train": train}.items() if share > 0}


def _as_in_training(place: str) -> Source | None:
    """Return the splits that training would make of a folder of plain text files; None where there are others."""
    if place in EMBEDDED:
        return Source(place, open_corpus(place).splits)
    path = Path(place).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())
    others = (*LINES, *ROWS, *COMPRESSED, ".zip")
    if any(one.suffix.lower() in others for one in files):
        return None
    return Source(place, open_corpus(path).splits)


def usual(split: str) -> str | None:
    """Return what a split is called here; None for one that is none of the usual ones."""
    return _NAMES.get(split)


def _split(place: Place) -> str | None:
    """Return the split that a file's folder says, or a table's name."""
    path = PurePosixPath(place.name)
    for part in path.parts[:-1]:
        if part in _NAMES:
            return _NAMES[part]
    found = _TABLE.match(path.name) if place.suffix in LINES + ROWS else None
    return _NAMES[found[1]] if found else None


def _titles(found: Sequence[Place]) -> dict[str, str]:
    titles: dict[str, str] = {}
    for one in found:
        if one.name == METADATA:
            with opened(one.url) as handle:
                titles |= read_titles(handle.read())
    return titles
