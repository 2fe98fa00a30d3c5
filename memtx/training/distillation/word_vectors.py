"""Nearest words by their vectors: those of a GloVe file, or the token embeddings of an encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memtx.data.hf_tokenizers import HFTokenizer
from memtx.errors import DataError
from memtx.models.encoder import Encoder

WORD = re.compile(r"[^\W\d_]+")
"""A word: letters of any script."""

MAX_VECTORS = 100_000
"""Words of a file of vectors that are used, the most frequent ones."""


class Neighbors(Protocol):
    """Finds the words that are nearest to one."""

    def find(self, word: str, count: int) -> list[str]:
        """Return the nearest words, nearest first; empty for an unknown word."""


class WordVectors:
    """Words with a vector each, compared by their cosine.

    Args:
        words: The words.
        vectors: ``(words, width)`` of any float dtype.
        embed: Returns the vector ``(width,)`` of a word that is not in ``words``, or None.
    """

    def __init__(
        self,
        words: Sequence[str],
        vectors: NDArray[np.float32],
        embed: Callable[[str], NDArray[np.float32] | None] = lambda word: None,
    ) -> None:
        self.words, self._embed = list(words), embed
        self._vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        self._index = {word: index for index, word in reversed(list(enumerate(self.words)))}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> WordVectors:
        """Read the first ``MAX_VECTORS`` words of a file in the format of GloVe, or of fastText with its first line.

        Raises DataError if it is missing or a line is no word with numbers.
        """
        words: list[str] = []
        vectors: list[NDArray[np.float32]] = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    parts = line.rstrip().split(" ")
                    if number == 1 and len(parts) == 2:
                        continue
                    width = len(vectors[0]) if vectors else len(parts) - 1
                    # A word may hold spaces.
                    vector = np.array(parts[-width:], dtype=np.float32)
                    if width < 1 or len(parts) <= width or not np.isfinite(vector).all():
                        raise ValueError(f"expected a word and {width} numbers")
                    words.append(" ".join(parts[:-width]))
                    vectors.append(vector)
                    if len(words) == MAX_VECTORS:
                        break
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}.", "Check the path.") from error
        except ValueError as error:
            message = f"'{path}', line {number}: no word with its vector ({error})."
            raise DataError(message, "Give a text file of GloVe: a word and its numbers on each line.") from error
        if not words:
            raise DataError(f"'{path}' holds no word.", "Give a text file of GloVe.")
        return cls(words, np.stack(vectors))

    @classmethod
    def from_encoder(cls, model: Encoder, tokenizer: HFTokenizer) -> WordVectors:
        """Take the token embeddings of whole words; a word of several pieces has their mean."""
        table = model.embedding.word_embeddings.weight.detach().float().cpu().numpy()
        ids = np.flatnonzero(find_words(tokenizer))

        def embed(word: str) -> NDArray[np.float32] | None:
            pieces = [piece for piece in tokenizer.encode(word).tolist() if piece != tokenizer.unk_token_id]
            return table[pieces].mean(0) if pieces else None

        return cls([tokenizer.decode([index]).strip() for index in ids.tolist()], table[ids], embed)

    def find(self, word: str, count: int) -> list[str]:
        """Return the nearest words, nearest first; empty for an unknown word."""
        index = self._index.get(word, self._index.get(word.lower()))
        vector = self._vectors[index] if index is not None else self._embed(word)
        if vector is None:
            return []
        order = np.argsort(-(self._vectors @ vector), kind="stable")[: count + 1]
        return [self.words[other] for other in order if other != index and self.words[other] != word][:count]


def find_words(tokenizer: HFTokenizer) -> NDArray[np.bool_]:
    """Return which ids are whole words of letters, ``(vocab_size,)``."""
    # A piece that continues a word has no space before it.
    contents = [tokenizer.token_bytes(index).decode("utf-8", "replace") for index in range(tokenizer.vocab_size)]
    return np.array([text[:1] == " " and WORD.fullmatch(text[1:]) is not None for text in contents], dtype=bool)
