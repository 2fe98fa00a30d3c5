"""Sentences hidden among the sentences of a text, at given places and to a given length in tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.data.sources.base import Document
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError

TokenIds = NDArray[np.int64]

MAX_SENTENCE_CHARS = 600
"""Characters of a sentence at most: tables and lists know no full stop."""

# Behind a full stop, and a quotation mark or bracket that closes there.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]\u201d\u2019])\s+|\n\s*\n")


def split_sentences(text: str) -> list[str]:
    """Return a text's sentences, about: cut behind full stops and at blank lines, each on one line."""
    found = []
    for part in _SENTENCE_END.split(text):
        line = " ".join(part.split())
        found += [line[at : at + MAX_SENTENCE_CHARS] for at in range(0, len(line), MAX_SENTENCE_CHARS)]
    return [one for one in found if one]


def encode_ids(tokenizer: Tokenizer, text: str) -> TokenIds:
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
        self._sentences = [one for document in documents for one in split_sentences(document.read())]
        self._token_ids: dict[int, TokenIds] = {}
        if not self._sentences:
            raise DataError("There is no sentence in the texts.", "Give texts that have some.")

    def _encode_sentence(self, index: int) -> TokenIds:
        index %= len(self._sentences)
        if index not in self._token_ids:
            self._token_ids[index] = encode_ids(self.tokenizer, " " + self._sentences[index])
        return self._token_ids[index]

    def sample_filler(self, length: int, generator: torch.Generator) -> list[TokenIds]:
        """Return neighbouring sentences from a random one on, ``length`` tokens together; the first is cut to fit."""
        number = int(torch.randint(len(self._sentences), (), generator=generator))
        taken: list[TokenIds] = []
        held = 0
        while held < length:
            taken.append(self._encode_sentence(number))
            held += len(taken[-1])
            number += 1
        while taken and held - length >= len(taken[0]):
            held -= len(taken.pop(0))
        if taken:
            taken[0] = taken[0][held - length :]
        return taken

    def hide(
        self, facts: Sequence[TokenIds], depths: Sequence[float], length: int, generator: torch.Generator
    ) -> TokenIds | None:
        """Return (length,) tokens of sentences with facts among them; None where the facts alone are longer.

        Args:
            facts: each as tokens, in order.
            depths: of each the share of the other text that stands before it, ascending from 0 to 1; it is moved to
                the nearest end of a sentence.
            length: tokens of all.
            generator: of the choice of sentences.
        """
        rest = length - sum(map(len, facts))
        if rest < 0:
            return None
        filler = self.sample_filler(rest, generator)
        borders = np.cumsum([0, *map(len, filler)])
        before = [int(np.abs(borders - place * rest).argmin()) for place in depths]
        parts: list[TokenIds] = [np.zeros(0, dtype=np.int64)]
        at = 0
        for fact, stop in zip(facts, before, strict=True):
            parts += [*filler[at:stop], fact]
            at = stop
        return np.concatenate([*parts, *filler[at:]])
