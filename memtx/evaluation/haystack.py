"""Sentences hidden among the sentences of a text, at given places and to a given length in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.data.document import Document
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError

Ids = NDArray[np.int64]

LONGEST = 600
"""Characters of a sentence at most: tables and lists know no full stop."""

# Behind a full stop, and a quotation mark or bracket that closes there.
_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]\u201d\u2019])\s+|\n\s*\n")


def sentences_of(text: str) -> list[str]:
    """Return a text's sentences, about: cut behind full stops and at blank lines, each on one line."""
    found = []
    for part in _END.split(text):
        line = " ".join(part.split())
        found += [line[at : at + LONGEST] for at in range(0, len(line), LONGEST)]
    return [one for one in found if one]


def encoded(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the ids of a text, (tokens,)."""
    return np.asarray(tokenizer.encode(text), dtype=np.int64)


class Haystack:
    """The sentences of documents, in order, as tokens.

    Args:
        documents: what is read; the last sentence is followed by the first.
        tokenizer: the model's.

    Raises:
        DataError: there is no sentence in them.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._sentences = [one for document in documents for one in sentences_of(document.read())]
        self._ids: dict[int, Ids] = {}
        if not self._sentences:
            raise DataError("There is no sentence in the texts.", "Give texts that have some.")

    def _encoded(self, number: int) -> Ids:
        number %= len(self._sentences)
        if number not in self._ids:
            self._ids[number] = encoded(self.tokenizer, " " + self._sentences[number])
        return self._ids[number]

    def filler(self, length: int, generator: torch.Generator) -> list[Ids]:
        """Return neighbouring sentences from a random one on, ``length`` tokens together; the first is cut to fit."""
        number = int(torch.randint(len(self._sentences), (), generator=generator))
        taken: list[Ids] = []
        held = 0
        while held < length:
            taken.append(self._encoded(number))
            held += len(taken[-1])
            number += 1
        while taken and held - length >= len(taken[0]):
            held -= len(taken.pop(0))
        if taken:
            taken[0] = taken[0][held - length :]
        return taken

    def hiding(
        self, facts: Sequence[Ids], places: Sequence[float], length: int, generator: torch.Generator
    ) -> Ids | None:
        """Return (length,) tokens of sentences with facts among them; None where the facts alone are longer.

        Args:
            facts: each as tokens, in order.
            places: of each the share of the other text that stands before it, ascending from 0 to 1; it is moved to
                the nearest end of a sentence.
            length: tokens of all.
            generator: of the choice of sentences.
        """
        rest = length - sum(map(len, facts))
        if rest < 0:
            return None
        filler = self.filler(rest, generator)
        borders = np.cumsum([0, *map(len, filler)])
        before = [int(np.abs(borders - place * rest).argmin()) for place in places]
        parts: list[Ids] = [np.zeros(0, dtype=np.int64)]
        at = 0
        for fact, stop in zip(facts, before, strict=True):
            parts += [*filler[at:stop], fact]
            at = stop
        return np.concatenate([*parts, *filler[at:]])
