"""Word-level tokenizer of language modeling benchmarks: words between white space, and a token at each line end."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memtx.data.base_tokenizer import EncodedChunk, TextEncoder, TokenIds, Tokenizer
from memtx.data.encodings import encode_utf8
from memtx.data.safe_cuts import TextChunk
from memtx.data.token_decoder import Utf8TextDecoder
from memtx.data.words import WordIds
from memtx.errors import DataError

MAX_WORD_LENGTH = 8192
"""Characters at which a word ends in any case, so that a text without white space needs no memory of its size."""

UNKNOWN_WORDS = ("<unk>", "<UNK>", "<unknown>", "[UNK]")
"""Usual spellings of the token for words outside the vocabulary; the first is added to a trained vocabulary."""

_TOKEN = re.compile(rf"\r\n|\r|\n|\S{{1,{MAX_WORD_LENGTH}}}")


class WordTokenizer(Tokenizer):
    """Words between white space, numbered by frequency, as in Transformer-XL's original code.

    Training gives ``<eos>`` the id 0 and the words of the texts the following ids, frequent ones first; words of equal
    frequency are in the order in which they occur first. White space other than line ends has no token, so a decoded
    text has single spaces, and none at the beginning of a line. ``<eos>`` in a text is a word like others.

    Args:
        vocab_size: Number of ids, that of the most frequent words with ``<eos>`` and ``<unk>``; fewer words leave ids
            unused. None for all words: then the size is known once the tokenizer is trained. Not used with ``path``.
        path: Vocabulary file in UTF-8: the first word of each line, ids in the order of the lines. None trains one.
        min_freq: Number of times that a word must occur in the training texts to be in the vocabulary.
        lower_case: If True, convert texts to lower case.
        eos_token: Token of a line end; None for line ends without a token. Added to a file that lacks it.

    Raises:
        DataError: A number is out of range, or the file is missing, has no word, or has one twice.
    """

    bos_token_id = None
    trains_on_all_texts = True

    def __init__(
        self,
        vocab_size: int | None = None,
        path: str | None = None,
        min_freq: int = 1,
        *,
        lower_case: bool = False,
        eos_token: str | None = "<eos>",
    ) -> None:
        if min_freq < 1 or (vocab_size is not None and vocab_size < 2):
            message = f"The vocabulary has vocab_size={vocab_size} and min_freq={min_freq}."
            raise DataError(message, "Give a vocab_size of at least 2, or none, and a min_freq of at least 1.")
        if eos_token is not None and not eos_token.split() == [eos_token]:
            raise DataError(f"eos_token is {eos_token!r}, expected one word.", "Give one, such as <eos>.")
        self._vocab_size, self.min_freq, self.lower_case = vocab_size, min_freq, lower_case
        self.eos_token = eos_token
        self._words: list[str] = []
        if path is not None:
            self._set_words(_read_words(path), path)
            self._vocab_size = None

    def _set_words(self, words: Sequence[str], name: str) -> None:
        words = [*words, *(token for token in (self.eos_token,) if token is not None and token not in set(words))]
        self._ids = {word: token_id for token_id, word in enumerate(words)}
        if not words or len(self._ids) < len(words):
            repeated = next((word for word, count in Counter(words).items() if count > 1), None)
            message = f"The vocabulary '{name}' has " + (f"'{repeated}' twice." if words else "no words.")
            raise DataError(message, "Give each word once, one per line.")
        self._words = list(words)
        self.eos_id = None if self.eos_token is None else self._ids[self.eos_token]
        self.unk_id = next((self._ids[word] for word in UNKNOWN_WORDS if word in self._ids), None)

    @property
    def is_trained(self) -> bool:
        """True if it was trained or read from a file."""
        return bool(self._words)

    @property
    def vocab_size(self) -> int:
        """Number of ids; raises DataError before training if it is that of all words."""
        if self._vocab_size is None and not self._words:
            raise DataError("The number of words is not known before training.", "Give vocab_size, or prepare texts.")
        return max(self._vocab_size or 0, len(self._words))

    @property
    def knows_vocab_size(self) -> bool:
        """False before training if the size is that of all words."""
        return self._vocab_size is not None or self.is_trained

    @property
    def training_options(self) -> str:
        """Options that determine the vocabulary of given texts, as text."""
        return f"{self._vocab_size} {self.min_freq} {self.lower_case} {self.eos_token}"

    def train(self, texts: Iterable[str]) -> None:
        """Count the words of whole texts; does nothing if the tokenizer is trained."""
        self.train_documents([text] for text in texts)

    def train_documents(self, documents: Iterable[Iterable[str]]) -> None:
        """Count the words of texts, each in any portions; does nothing if the tokenizer is trained."""
        if self.is_trained:
            return
        counts: Counter[str] = Counter()
        for document in documents:
            encoder = _WordEncoder(self)
            for text in document:
                counts.update(filter(None, map(self._spell, _TOKEN.findall(encoder.take(text)))))
            counts.update(filter(None, map(self._spell, _TOKEN.findall(encoder.pending))))
        special = [] if self.eos_token is None else [self.eos_token]
        words = [word for word, count in counts.most_common() if count >= self.min_freq and word != self.eos_token]
        words = words[: None if self._vocab_size is None else self._vocab_size - len(special)]
        if not set(words) & set(UNKNOWN_WORDS):
            is_full = self._vocab_size is not None and len(words) + len(special) == self._vocab_size
            words = [*(words[:-1] if is_full else words), UNKNOWN_WORDS[0]]
        self._set_words([*special, *words], "the training texts")

    def _spell(self, token: str) -> str:
        """Return a word as it is in the vocabulary; a line end is no word."""
        return "" if token[0] in "\r\n" else token.lower() if self.lower_case else token

    def _to_id(self, token: str, parse_special: bool) -> int | None:
        """Return the id of a token of a text; None for a line end without one."""
        if token[0] in "\r\n":
            return self.eos_id
        word = self._spell(token)
        if parse_special and token == self.eos_token:
            return self.eos_id
        token_id = self.unk_id if word == self.eos_token else self._ids.get(word, self.unk_id)
        if token_id is None:
            message = f"'{word[:40]}' is not in the vocabulary, which has no token for unknown words."
            raise DataError(message, f"Add {UNKNOWN_WORDS[0]} to the vocabulary, or remove the word.")
        return token_id

    def split_tokens(self, text: str, *, parse_special: bool = False) -> tuple[TokenIds, list[bytes]]:
        """Return the ids of a text, ``(tokens,)`` int64, and the bytes of it that each stands for."""
        if not self._words:
            raise DataError("This WordTokenizer is not trained yet.", "Call train(texts), or give the path of a file.")
        encode_utf8(text)  # raises DataError for a lone surrogate
        ids, ends = [], [0]
        for match in _TOKEN.finditer(text):
            token_id = self._to_id(match[0], parse_special)
            if token_id is not None:
                ids.append(token_id)
                ends.append(match.end())
        ends[-1] = len(text) if ids else 0
        return np.array(ids, dtype=np.int64), [text[start:end].encode() for start, end in itertools.pairwise(ends)]

    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of a text, ``(tokens,)`` int64; raises DataError for a word that has none."""
        return self.split_tokens(chunk)[0]

    def encoder(self, *, pending: str = "", continues: bool = False, parse_special: bool = False) -> TextEncoder:
        """Return an encoder of one text that arrives in portions."""
        return _WordEncoder(self, pending, parse_special)

    def align(self, encoded: EncodedChunk) -> list[bytes]:
        """Return the bytes of the text that each token of a chunk stands for, with the white space before it."""
        for parse_special in (False, True):
            ids, contents = self.split_tokens(encoded.chunk.text, parse_special=parse_special)
            if np.array_equal(ids, encoded.ids):
                return contents
        raise AssertionError("the ids are not those of the chunk")

    def token_bytes(self, token_id: int) -> bytes:
        """Return a space and the word, or a line end; empty for ids without a word."""
        self._check_token_id(token_id)
        if token_id >= len(self._words):
            return b""
        return b"\n" if token_id == self.eos_id else f" {self._words[token_id]}".encode()

    def token_contents(self, ids: Sequence[int], *, continues: bool) -> list[bytes]:
        """Return the bytes of each token of a text, or of a part of one that ``continues`` other tokens."""
        decoder = self.decoder(continues=continues)
        return [decoder.feed(token_id).encode() for token_id in ids]

    def decoder(self, *, continues: bool = False, pending: bytes = b"") -> Utf8TextDecoder:
        """Return a decoder of the tokens of one text, as they come."""
        return _WordDecoder(self, continues, pending)

    def word_ids(self, ids: Sequence[int]) -> WordIds:
        """Return the index of each token's word, ``(tokens,)`` int64: every token is a word."""
        return np.arange(len(ids), dtype=np.int64)

    def to_json(self) -> str:
        """Return the vocabulary and the options as JSON text."""
        options = {name: getattr(self, name) for name in ("min_freq", "lower_case", "eos_token")}
        header = {"format": "memtx.tokenizer", "version": 1, "kind": "word", "vocab_size": self._vocab_size}
        return json.dumps({**header, **options, "words": self._words}, ensure_ascii=False)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> WordTokenizer:
        """Return the tokenizer of the object that :meth:`to_json` wrote; raises DataError if it is damaged."""
        words, size, eos = (description.get(name) for name in ("words", "vocab_size", "eos_token"))
        is_valid = isinstance(words, list) and all(isinstance(word, str) and word for word in words)
        if not is_valid or not isinstance(size, int | None) or not isinstance(eos, str | None):
            raise DataError("The tokenizer's vocabulary is damaged.", "Restore it from a copy.")
        assert isinstance(words, list)
        min_freq, lower_case = int(description.get("min_freq", 1)), bool(description.get("lower_case", False))
        tokenizer = cls(None, None, min_freq, lower_case=lower_case, eos_token=eos)
        tokenizer._vocab_size = size
        if words:
            tokenizer._set_words(words, "the tokenizer")
        return tokenizer


class _WordEncoder(TextEncoder):
    """Encoder that holds a text back until its last word or line end is complete."""

    def __init__(self, tokenizer: WordTokenizer, pending: str = "", parse_special: bool = False) -> None:
        self._tokenizer, self._pending, self._parse_special = tokenizer, pending, parse_special

    @property
    def pending(self) -> str:
        """Text whose ids are not known yet."""
        return self._pending

    def take(self, text: str) -> str:
        """Add a portion and return the text that is now complete."""
        buffer, end = self._pending + text, 0
        for match in _TOKEN.finditer(buffer):
            is_open = match.end() == len(buffer) and (match[0] == "\r" or match[0][-1] not in "\r\n")
            if not is_open or match.end() - match.start() == MAX_WORD_LENGTH:
                end = match.end()
        self._pending = buffer[end:]
        return buffer[:end]

    def feed(self, text: str) -> list[EncodedChunk]:
        """Take the next portion of the text and return the chunk that is now complete."""
        return self._encode(self.take(text))

    def flush(self) -> list[EncodedChunk]:
        """End the text and return its last chunk."""
        text, self._pending = self._pending, ""
        return self._encode(text)

    def _encode(self, text: str) -> list[EncodedChunk]:
        if not text.strip() and not ("\n" in text or "\r" in text):
            return []
        ids, _ = self._tokenizer.split_tokens(text, parse_special=self._parse_special)
        return [EncodedChunk(TextChunk(text), ids)]


class _WordDecoder(Utf8TextDecoder):
    """Decoder that leaves out the space at the beginning of the text and of each line."""

    def __init__(self, tokenizer: WordTokenizer, continues: bool, pending: bytes) -> None:
        super().__init__(tokenizer.token_bytes, pending)
        self._is_line_start = not continues

    def feed(self, token_id: int) -> str:
        """Return the characters that a token completes."""
        text = super().feed(token_id)
        text = text.removeprefix(" ") if self._is_line_start else text
        self._is_line_start = self._is_line_start if not text else text == "\n"
        return text


def _read_words(path: str | os.PathLike[str]) -> list[str]:
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The vocabulary '{path}' cannot be read: {error}.", "Check the path.") from error
    return [words[0] for words in map(str.split, lines) if words]
