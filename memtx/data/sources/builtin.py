"""Corpora that need no download: the help texts and sources that ship with Python."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from memtx.data.sources.base import Document
from memtx.errors import DataError

BUILTIN_ROOTS = ("embedded", "embedded+sources")
MIN_TOPIC_LENGTH = 8000  # characters from which a help topic is a document; shorter ones are joined in order


def builtin_splits(*, include_stdlib: bool) -> dict[str, list[Document]]:
    """Return the interpreter's help topics (``pydoc_data.topics``), every tenth in validation and every tenth in test.

    They change with the version of Python; the fingerprint of the tokens covers that. With ``include_stdlib`` the
    top-level source files of the standard library are added, about 10 MB.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        message = "This Python has no pydoc_data, the source of the embedded corpus."
        raise DataError(message, "Give texts with --data.root PATH.")
    from pydoc_data.topics import topics

    documents: list[Document] = []
    names: list[str] = []
    text = ""
    for name in sorted(topics):
        names.append(name)
        text += topics[name].strip("\n") + "\n\n\n"
        if len(text) >= MIN_TOPIC_LENGTH or name == max(topics):
            title = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            documents.append(Document("+".join(names), title, len(text.encode()), text=text))
            names, text = [], ""
    if include_stdlib:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents += [
            Document(path.name, path.name, size, str(path)) for path in paths if (size := path.stat().st_size)
        ]
    return {
        "train": [document for index, document in enumerate(documents) if index % 10 not in (4, 9)],
        "validation": documents[4::10],
        "test": documents[9::10],
    }
