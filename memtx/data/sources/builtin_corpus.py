"""A corpus that every Python has: the interpreter's own help topics, for a first run without any download.

The texts are part of CPython (``pydoc_data.topics``) and change with its version; the tokens' fingerprint sees that.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

from memtx.data.sources.document import Document
from memtx.errors import DataError

MIN_DOCUMENT_LENGTH = 8000
"""Characters from which on a document stands alone; shorter topics are joined in alphabetical order."""


def builtin_splits(*, include_stdlib: bool = False) -> dict[str, list[Document]]:
    """Return the documents of each split: every tenth to validation, every tenth to test.

    Args:
        include_stdlib: add the standard library's top-level source files, about 10 MB more.

    Raises:
        DataError: this Python was built without its help texts.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        raise DataError(
            "This Python has no pydoc_data, from which the embedded corpus comes.", "Give texts with --data.root PATH."
        )
    from pydoc_data.topics import topics

    documents: list[Document] = []
    names: list[str] = []
    held = ""
    for name in sorted(topics):
        names.append(name)
        held += topics[name].strip("\n") + "\n\n\n"
        if len(held) >= MIN_DOCUMENT_LENGTH:
            documents.append(_topic_document(names, held))
            names, held = [], ""
    if held:
        documents.append(_topic_document(names, held))
    if include_stdlib:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            if size := path.stat().st_size:
                documents.append(Document(path.name, path.name, size, str(path)))
    return {
        "train": [one for place, one in enumerate(documents) if place % 10 not in (4, 9)],
        "validation": documents[4::10],
        "test": documents[9::10],
    }


def _topic_document(names: list[str], text: str) -> Document:
    title = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return Document(id="+".join(names), title=title, size=len(text.encode()), text=text)
