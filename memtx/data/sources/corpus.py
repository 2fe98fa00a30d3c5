"""Text corpora by one path: any folder or file of texts, or the help texts that ship with Python.

Opening a corpus only lists documents; text is read when it is asked for, with newlines as they are in the file.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from memtx.data.sources.assignment import SplitFractions
from memtx.data.sources.base import SPLITS, Corpus, CorpusManifest, Document, assign_split
from memtx.data.sources.builtin import BUILTIN_ROOTS, builtin_splits
from memtx.data.sources.files import is_table, scan_files
from memtx.data.sources.tables import TableColumns
from memtx.errors import DataError, closest_match

PG19_HINT = (
    "PG-19 is published by google-deepmind/pg19 on GitHub, its files in gs://deepmind-gutenberg: "
    "train/ validation/ test/ with one <id>.txt a book, and metadata.csv. "
    "Give the folder that holds them with --data.root PATH, or use --data.root embedded to try without."
)


def open_corpus(root: str | os.PathLike[str]) -> Corpus:
    """List the documents under a root, in the splits that :class:`memtx.data.sources.files.FileSource` documents.

    A table given by name is read into memory. Raises DataError if the root does not exist, holds no text, or holds
    tables, or a file is empty.

    Args:
        root: ``embedded`` (Python's help topics), ``embedded+sources`` (with the sources of the standard library), a
            folder of text files, such as the PG-19 layout, or one file.
    """
    name = str(root)
    if name in BUILTIN_ROOTS:
        return Corpus(name, builtin_splits(include_stdlib=name.endswith("sources")))
    if "://" not in name and not os.path.lexists(Path(root).expanduser()):
        match = closest_match(name, BUILTIN_ROOTS)
        raise DataError(f"'{root}' does not exist, expected a folder of texts or one text file.{match}", PG19_HINT)
    try:
        manifest = scan_files([name], TableColumns(), SplitFractions())
    except DataError as error:
        raise DataError(error.message, PG19_HINT if "holds no text" in error.message else error.hint) from error
    # The few rows of a small table are documents already.
    is_text = all(isinstance(part, Document) and not part.is_table_row for part, _ in manifest.iter_parts())
    if not is_text and not is_table(name):
        hint = f"Tokenize them once: memtx prepare {shlex.quote(name)} --output-dir FOLDER, and give that folder."
        raise DataError(f"'{root}' holds tables of texts, expected text files or one table given by name.", hint)
    return Corpus(name, _read_documents(manifest), left_out=manifest.left_out, assignment=manifest.assignment)


def _read_documents(manifest: CorpusManifest) -> dict[str, Sequence[Document]]:
    """Return the documents of each split; reads those of tables."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for part, fractions in manifest.iter_parts():
        for document in part.iter_documents():
            if not document.is_table_row or document.text.strip():
                splits[assign_split(document.id, fractions)].append(document)
    return dict(splits)
