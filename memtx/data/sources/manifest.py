"""All there is to encode: the parts of a source, and the split that each of its documents belongs to."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memtx.data.sources.document import SourcePart

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class CorpusManifest:
    """The parts of a source.

    Attributes:
        name: what to call it in messages.
        split_parts: the parts of each split, where the source itself has splits.
        unsplit_parts: parts whose documents are dealt to splits by their names.
        split_fractions: what each split gets of those; above 0, adding up to 1.
    """

    name: str
    split_parts: Mapping[str, Sequence[SourcePart]] = field(default_factory=dict)
    unsplit_parts: Sequence[SourcePart] = ()
    split_fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it may have documents for, the usual ones in their usual order."""
        found = {name for name, parts in self.split_parts.items() if parts} | set(
            self.split_fractions if self.unsplit_parts else ()
        )
        return tuple(
            name for name in dict.fromkeys((*SPLITS, *self.split_parts, *self.split_fractions)) if name in found
        )

    @property
    def size(self) -> int:
        """Bytes in the source."""
        return sum(part.size for part, _ in self.iter_parts())

    def iter_parts(self) -> Iterator[tuple[SourcePart, Mapping[str, float]]]:
        """Yield every part with the shares that its documents are dealt by."""
        for name in self.splits:
            yield from ((part, {name: 1.0}) for part in self.split_parts.get(name, ()))
        yield from ((part, self.split_fractions) for part in self.unsplit_parts)


def assign_split(document_id: str, split_fractions: Mapping[str, float]) -> str:
    """Return the split of a document: a function of its name and the shares alone."""
    *rest, last = split_fractions
    if not rest:
        return last
    place = int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for split in rest:
        place -= split_fractions[split]
        if place < 0:
            return split
    return last


class TextSource(ABC):
    """Where texts come from, as a part to be configured: it says what there is when it is asked."""

    @abstractmethod
    def scan(self) -> CorpusManifest:
        """List the parts.

        Raises:
            DataError: nothing is there, or it cannot be read.
        """
