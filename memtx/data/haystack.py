"""Sentences hidden in text: documents as a haystack of tokenized sentences, with facts in between."""

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
"""Maximum number of characters in a sentence: tables and lists have no full stops."""

# After a full stop, optionally with a closing quotation mark or bracket, and at blank lines.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]\u201d\u2019])\s+|\n\s*\n")


def split_sentences(text: str) -> list[str]:
    """Split a text into approximate sentences, after full stops and at blank lines, each on one line."""
    sentences = []
    for part in _SENTENCE_END.split(text):
        line = " ".join(part.split())
        sentences += [line[start : start + MAX_SENTENCE_CHARS] for start in range(0, len(line), MAX_SENTENCE_CHARS)]
    return sentences


def encode_ids(tokenizer: Tokenizer, text: str) -> TokenIds:
    """Return the ids of a text, ``(length,)`` int64."""
    return np.asarray(tokenizer.encode(text), dtype=np.int64)


class Haystack:
    """The sentences of documents in order, repeated, as tokens; raises DataError if there are none."""

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._sentences = [sentence for document in documents for sentence in split_sentences(document.read())]
        self._token_ids: dict[int, TokenIds] = {}
        if not self._sentences:
            raise DataError("The texts have no sentences.", "Give other texts.")

    def _encode_sentence(self, index: int) -> TokenIds:
        index %= len(self._sentences)
        if index not in self._token_ids:
            self._token_ids[index] = encode_ids(self.tokenizer, " " + self._sentences[index])
        return self._token_ids[index]

    def sample_filler(self, length: int, generator: torch.Generator) -> list[TokenIds]:
        """Return consecutive sentences from a random start, ``length`` tokens in total; the first is cut to fit."""
        index = int(torch.randint(len(self._sentences), (), generator=generator))
        sentences: list[TokenIds] = []
        total = 0
        while total < length:
            sentences.append(self._encode_sentence(index))
            total += len(sentences[-1])
            index += 1
        while sentences and total - length >= len(sentences[0]):
            total -= len(sentences.pop(0))
        if sentences:
            sentences[0] = sentences[0][total - length :]
        return sentences

    def hide(
        self, facts: Sequence[TokenIds], depths: Sequence[float], length: int, generator: torch.Generator
    ) -> TokenIds | None:
        """Return ``(length,)`` tokens of random consecutive sentences with facts in between; None if facts do not fit.

        ``depths`` is the fraction of filler text before each fact, ascending from 0 to 1; facts are moved to the
        nearest sentence boundary.
        """
        filler_length = length - sum(map(len, facts))
        if filler_length < 0:
            return None
        filler = self.sample_filler(filler_length, generator)
        boundaries = np.cumsum([0, *map(len, filler)])
        parts: list[TokenIds] = [np.zeros(0, dtype=np.int64)]
        start = 0
        for fact, depth in zip(facts, depths, strict=True):
            end = int(np.abs(boundaries - depth * filler_length).argmin())
            parts += [*filler[start:end], fact]
            start = end
        return np.concatenate([*parts, *filler[start:]])

    def hide_in_order(self, facts: Sequence[TokenIds], length: int, generator: torch.Generator) -> TokenIds | None:
        """Return what :meth:`hide` does, with facts at random depths in their order."""
        depths = torch.rand(len(facts), generator=generator).sort().values.tolist()
        return self.hide(facts, depths, length, generator)
