"""All there is to encode: the parts of a source, and the split that each of its documents belongs to."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from memtx.data.document import Part

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """The parts of a source.

    Attributes:
        name: what to call it in messages.
        laid_out: the parts of each split, where the source itself has splits.
        mixed: parts whose documents are dealt to splits by their names.
        shares: what each split gets of those; above 0, adding up to 1.
    """

    name: str
    laid_out: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    mixed: Sequence[Part] = ()
    shares: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it may have documents for, the usual ones in their usual order."""
        found = {name for name, parts in self.laid_out.items() if parts} | set(self.shares if self.mixed else ())
        return tuple(name for name in dict.fromkeys((*SPLITS, *self.laid_out, *self.shares)) if name in found)

    @property
    def size(self) -> int:
        """Bytes in the source."""
        return sum(part.size for part, _ in self.parts())

    def parts(self) -> Iterator[tuple[Part, Mapping[str, float]]]:
        """Yield every part with the shares that its documents are dealt by."""
        for name in self.splits:
            yield from ((part, {name: 1.0}) for part in self.laid_out.get(name, ()))
        yield from ((part, self.shares) for part in self.mixed)


def dealt(name: str, shares: Mapping[str, float]) -> str:
    """Return the split of a document: a function of its name and the shares alone."""
    *rest, last = shares
    if not rest:
        return last
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for split in rest:
        place -= shares[split]
        if place < 0:
            return split
    return last


class Texts(ABC):
    """Where texts come from, as a part to be configured: it says what there is when it is asked."""

    @abstractmethod
    def source(self) -> Source:
        """List the parts.

        Raises:
            DataError: nothing is there, or it cannot be read.
        """
