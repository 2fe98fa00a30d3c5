"""Assignment of parts to splits: by their names, else by fractions, of whole documents or of each of a few."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from memtx.data.sources.base import SPLITS, CorpusManifest, Document, SourcePart
from memtx.errors import DataError

DEFAULT_EVAL_FRACTION = 0.05  # for each of validation and test, if a source has no splits
MAX_BLANK_BYTES = 1 << 16  # of a part that is searched for words
MIN_WHOLE_DOCUMENTS = 10  # from which whole documents go to the splits; of fewer, each is cut into splits

SplitParts = Mapping[str, Sequence[SourcePart]]


class SplitFractions:
    """Fractions of the documents for validation and test; None keeps the splits of the source.

    Raises DataError if a fraction is out of range.
    """

    def __init__(self, validation_fraction: float | None = None, test_fraction: float | None = None) -> None:
        fractions = {"validation": validation_fraction, "test": test_fraction}
        self.explicit = {split: value for split, value in fractions.items() if value is not None}
        for split, fraction in self.explicit.items():
            if not 0 <= fraction < 1:
                message = f"{split}_fraction is {fraction}, expected a share from 0 up to 1."
                raise DataError(message, "Give for example 0.01.")
        self.resolve(has_splits=False)

    def resolve(self, *, has_splits: bool) -> dict[str, float]:
        """Return the fraction of each split, above 0; those that are None are 0 if the source has splits, else 0.05."""
        default = 0.0 if has_splits else DEFAULT_EVAL_FRACTION
        fractions = {split: self.explicit.get(split, default) for split in SPLITS[1:]}
        fractions["train"] = 1 - sum(fractions.values())
        if fractions["train"] <= 0:
            message = f"The shares validation_fraction and test_fraction add up to {1 - fractions['train']}."
            raise DataError(message, "Give smaller ones, so that some documents are left to train on.")
        return {split: fraction for split, fraction in fractions.items() if fraction > 0}


def assign_parts(
    name: str,
    split_parts: SplitParts,
    unsplit_parts: Sequence[SourcePart],
    fractions: SplitFractions,
    left_out: Mapping[str, Sequence[str]],
) -> CorpusManifest:
    """Return the manifest of the parts with a split and of those without one, which are assigned by fractions.

    If fractions are given, they apply to the documents of "train" and of their own splits; a split with fraction 0 is
    left out. Fewer than 10 documents are cut, each into all splits; of more, whole documents are assigned by their ids.
    """
    pool = list(unsplit_parts)
    if split_parts and fractions.explicit:
        if unused := [split for split, fraction in fractions.explicit.items() if not fraction and split in split_parts]:
            left_out = {**left_out, "splits with fraction 0": unused}
        redrawn = ("train", *fractions.explicit)
        pool += [part for split in redrawn if split not in unused for part in split_parts.get(split, ())]
        split_parts = {split: parts for split, parts in split_parts.items() if split not in redrawn}
        split_fractions = fractions.resolve(has_splits=True)
    else:
        split_fractions = fractions.resolve(has_splits=False)
    if not pool:
        return CorpusManifest(name, split_parts, left_out=left_out)
    unit, assigned = "whole documents", dict[str, list[Document]]()
    if (documents := _read_few(pool)) is not None:
        unit, assigned = "each document", _cut_documents(documents, split_fractions)
    elif len(texts := [part for part in pool if isinstance(part, Document)]) == len(pool):
        assigned = _assign_documents(texts, split_fractions)
    shares = ", ".join(f"{split_fractions[split]:.3g} {split}" for split in SPLITS if split in split_fractions)
    verb = "are assigned" if unit == "whole documents" else "is cut"
    reason = "as its fractions say" if fractions.explicit else "because nothing in it is named after a split"
    assignment = f"'{name}': {unit} {verb} to splits ({shares}), {reason}."
    if unit == "each document" and set(assigned) == {"train"} and len(split_fractions) > 1:
        assignment = f"'{name}': all texts are for training, because they are too short to be cut into splits."
    if not assigned:
        return CorpusManifest(name, split_parts, pool, split_fractions, left_out, assignment)
    return CorpusManifest(name, {**split_parts, **assigned}, left_out=left_out, assignment=assignment)


def _read_few(parts: Sequence[SourcePart]) -> list[Document] | None:
    """Return all documents with a word, or None if there are 10 or more; reads the first rows of tables only."""
    if sum(isinstance(part, Document) for part in parts) >= MIN_WHOLE_DOCUMENTS:
        return None
    documents: list[Document] = []
    for document in (document for part in parts for document in part.iter_documents()):
        if document.is_table_row and not document.text.strip():
            continue
        documents.append(document)
        if len(documents) >= MIN_WHOLE_DOCUMENTS:
            return None
    return documents


def _assign_documents(documents: Sequence[Document], fractions: Mapping[str, float]) -> dict[str, list[Document]]:
    """Assign whole documents by a hash of their ids, at least one to each split."""

    def digest(document: Document) -> bytes:
        return hashlib.sha256(document.id.encode("utf-8", "surrogatepass")).digest()

    ranked, split_by_id, start = sorted(documents, key=digest), dict[str, str](), 0
    for split in reversed(SPLITS[1:]):
        count = max(1, round(fractions[split] * len(ranked))) if split in fractions else 0
        split_by_id |= {document.id: split for document in ranked[start : start + count]}
        start += count
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS if split in fractions}
    for document in documents:
        splits[split_by_id.get(document.id, "train")].append(document)
    return splits


def _cut_documents(documents: Sequence[Document], fractions: Mapping[str, float]) -> dict[str, list[Document]]:
    """Cut each document into the splits at paragraph ends; one without words for each of them is in "train"."""
    order = [split for split in SPLITS if split in fractions]
    splits: dict[str, list[Document]] = {split: [] for split in order}
    for document in documents:
        size = document.count_bytes()
        borders, total = [0], 0.0
        for split in order[:-1]:
            total += fractions[split]
            borders.append(max(borders[-1], _paragraph_end(document, size, total)))
        pieces = [document.cut(*border) for border in zip(borders, [*borders[1:], size], strict=True)]
        if len(order) == 1 or not all(map(_has_words, pieces)):
            splits["train"].append(document)
        else:
            for split, piece in zip(order, pieces, strict=True):
                splits[split].append(piece)
    return {split: documents for split, documents in splits.items() if documents}


def _has_words(document: Document) -> bool:
    """Return False for a short text without words; a long one is not read."""
    if document.size > MAX_BLANK_BYTES:
        return True
    return bool(b"".join(document.iter_bytes()).decode("utf-8", "ignore").replace("\ufeff", "").strip())


def _paragraph_end(document: Document, size: int, fraction: float) -> int:
    """Return the byte after the first paragraph end past a fraction of the text, else after a line or character."""
    target = int(size * fraction)
    # A fortieth of the text bounds the shift, so the parts keep their order and about their sizes.
    window = b"".join(document.iter_bytes(target, min(size, target + max(4, min(size // 40, 1 << 22)))))
    for pattern in (rb"\n\r?\n[\r\n]*", rb"\n", rb"(?=[\x00-\x7f\xc0-\xff])"):
        if match := re.search(pattern, window):
            return target + match.end()
    return size
