"""Names of splits in the names of files and folders, by one table for all sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_HINT = "Name a file or folder train, validation (valid, val, dev, eval) or test."

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tokens", ".raw")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

# Also train2017, testset.
_ALIAS = re.compile(rf"({'|'.join(sorted(SPLIT_ALIASES, key=len, reverse=True))})(set|data)?\d*")
# Numbers and checksums of shards, as in train-00000-of-00003-8f1d2c33ab45.parquet.
_SHARD = re.compile(r"\d+|of|part|shard|chunk|split|(?=[a-f]*\d)[0-9a-f]{8,}")

Template = tuple[str, ...]


def parse_name(name: str) -> tuple[str, Template] | None:
    """Return the split in the name of a file or folder and the words around it, or None for none or several.

    The words are in lower case, without the ending and the numbers of shards: ``wiki.train.tokens`` is
    ``("train", ("wiki", ""))``, ``train-00000-of-00003.txt`` is ``("train", ("",))``.
    """
    stem = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()  # trainData
    while (suffix := PurePosixPath(stem).suffix) in (*TEXT_SUFFIXES, *TABLE_SUFFIXES):
        stem = stem.removesuffix(suffix)
    words = [word for word in re.split(r"[\W_]+", stem) if word and not _SHARD.fullmatch(word)]
    matches = [_ALIAS.fullmatch(word) for word in words]
    splits = [SPLIT_ALIASES[match[1]] for match in matches if match]
    if len(splits) != 1:
        return None
    return splits[0], tuple("" if match else word for word, match in zip(words, matches, strict=True))


def infer_splits(names: Sequence[str]) -> list[str | None]:
    """Return the split that each path names, outer folders first, or None.

    A name with other words, such as ``the-acid-test.txt``, counts only beside the same words with another split
    (``wiki.train.tokens`` and ``wiki.test.tokens``), or as many words around those (``en.train.txt`` beside them), or a
    name without other words (``train.txt``).

    Args:
        names: Paths with ``/`` below the given folder, without the endings of compressions.
    """
    parsed = [[result for part in name.split("/") if (result := parse_name(part))] for name in names]
    splits_by_template: dict[Template, set[str]] = {}
    for split, template in (result for results in parsed for result in results):
        splits_by_template.setdefault(template, set()).add(split)
    is_layout = ("",) in splits_by_template

    def shape(template: Template) -> tuple[int, int]:
        return len(template), template.index("")

    shapes = {shape(template) for template, splits in splits_by_template.items() if len(splits) > 1}

    def counts(template: Template) -> bool:
        return is_layout or shape(template) in shapes

    return [next((split for split, template in results if counts(template)), None) for results in parsed]
