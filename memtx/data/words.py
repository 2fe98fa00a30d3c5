"""Words of tokenized texts: which tokens the tokenizer made from one word.

A tokenizer of the ``tokenizers`` library splits a text into words before it splits these into tokens; the same splitter
finds them again in the text of the tokens. Where there is none, words are runs of letters and digits.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WordIds = NDArray[np.int64]
"""Index of each token's word, ``(tokens,)``; it grows by 1 from word to word."""

UNKNOWN = b"x"
"""Text of tokens that the library does not know, and of bytes that are no character: a letter."""


def number_words(begins_word: Sequence[bool]) -> WordIds:
    """Return the word of each token, given whether it begins one; the first token always does."""
    ids: WordIds = np.cumsum(np.asarray([True, *begins_word[1:]], dtype=np.int64)[: len(begins_word)]) - 1
    return ids


def letter_word_ids(contents: Sequence[bytes]) -> WordIds:
    """Return the words of tokens of these bytes: letters and digits that follow others continue their word.

    Parts of characters beyond ASCII count as letters. A token without bytes is a word of its own.
    """

    def is_letter(byte: int) -> bool:
        return byte >= 0x80 or chr(byte).isalnum()

    begins, in_word = [], False
    for content in contents:
        begins.append(not (in_word and content and is_letter(content[0])))
        in_word = bool(content) and is_letter(content[-1])
    return number_words(begins)


def split_word_ids(contents: Sequence[bytes], find_word_ends: Callable[[str], Iterable[int]]) -> WordIds:
    """Return the words of tokens of these bytes, given the end of each word of a text, in characters.

    A token belongs to the word in which it starts, or to the next if it starts between two. One without bytes is a word
    of its own.
    """
    ids, num_words = np.empty(len(contents), dtype=np.int64), 0
    for has_text, group in itertools.groupby(range(len(contents)), key=lambda index: bool(contents[index])):
        indices = list(group)
        if has_text:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            parts = [decoder.decode(contents[index]).replace("\N{REPLACEMENT CHARACTER}", "x") for index in indices]
            token_starts = np.cumsum([0, *map(len, parts)])[:-1]
            text = "".join(parts) + decoder.decode(b"", final=True)
            words = np.searchsorted(sorted(find_word_ends(text)), token_starts, side="right")
            _, words = np.unique(words, return_inverse=True)
        else:
            words = np.arange(len(indices))
        ids[indices] = num_words + words
        num_words += int(words[-1]) + 1
    return ids


class WordSplitter:
    """The words of a library tokenizer.

    Args:
        backend: The library's object.
        description: Its JSON.
        token_bytes: Function from an id to the bytes of the token in a text; empty for special tokens.
    """

    def __init__(self, backend: Any, description: Mapping[str, Any], token_bytes: Callable[[int], bytes]) -> None:
        self._splitter, self._id_to_token = backend.pre_tokenizer, backend.id_to_token
        # Some only mark spaces or split nothing after the normalizer: then a whole text is one word.
        if len({*backend.encode("a b", add_special_tokens=False).word_ids}) < 2:
            self._splitter = None
        model = description["model"]
        self._prefix = model["continuing_subword_prefix"] if model.get("type") == "WordPiece" else None
        unknown = model.get("unk_token")
        if model.get("type") == "Unigram" and model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        self._unknown = None if unknown is None else backend.token_to_id(unknown)
        self._token_bytes = token_bytes

    def word_ids(self, ids: Sequence[int]) -> WordIds:
        """Return the words of tokens that follow each other in a text."""
        if self._prefix:
            return number_words([not (self._id_to_token(token) or "").startswith(self._prefix) for token in ids])
        # What the library does not know is a part of a word like any character.
        contents = [UNKNOWN if token == self._unknown else self._token_bytes(token) for token in ids]
        if self._splitter is None:
            return letter_word_ids(contents)
        return split_word_ids(contents, self._find_word_ends)

    def _find_word_ends(self, text: str) -> list[int]:
        return [end for _, (_, end) in self._splitter.pre_tokenize_str(text)]
