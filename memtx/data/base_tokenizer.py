"""Base of all tokenizers: text to ids and back, in portions of any size."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.safe_cuts import SafeSplitter, TextChunk
from memtx.data.text_chunks import TextSplitter
from memtx.data.token_decoder import TextDecoder, Utf8TextDecoder
from memtx.data.words import WordIds, letter_word_ids
from memtx.errors import DataError

TokenIds = NDArray[np.integer[Any]]


class EncodedChunk(NamedTuple):
    """A part of a text and its ids, ``(tokens,)`` of an integer dtype."""

    chunk: TextChunk
    ids: TokenIds


class TextEncoder(ABC):
    """Encodes one text that arrives in any portions; the ids, joined, are those of the whole text."""

    @property
    @abstractmethod
    def pending(self) -> str:
        """Text whose ids are not known yet."""

    @abstractmethod
    def feed(self, text: str) -> list[EncodedChunk]:
        """Take the next portion of the text and return the chunks that are now complete."""

    @abstractmethod
    def flush(self) -> list[EncodedChunk]:
        """End the text and return its last chunk."""


class ChunkEncoder(TextEncoder):
    """Encoder of the chunks of a splitter."""

    def __init__(
        self, splitter: TextSplitter | SafeSplitter, encode_chunks: Callable[[Sequence[TextChunk]], list[TokenIds]]
    ) -> None:
        self._splitter, self._encode_chunks = splitter, encode_chunks

    @property
    def pending(self) -> str:
        """Text whose ids are not known yet."""
        return self._splitter.pending

    def feed(self, text: str) -> list[EncodedChunk]:
        """Take the next portion of the text and return the chunks that are now complete."""
        return self._encode(self._splitter.feed(text))

    def flush(self) -> list[EncodedChunk]:
        """End the text and return its last chunk."""
        return self._encode(self._splitter.flush())

    def _encode(self, chunks: Sequence[str | TextChunk]) -> list[EncodedChunk]:
        text_chunks = [TextChunk(chunk) if isinstance(chunk, str) else chunk for chunk in chunks]
        return list(map(EncodedChunk, text_chunks, self._encode_chunks(text_chunks) if chunks else []))


class Tokenizer(ABC):
    """Base of all tokenizers. Ids are below ``vocab_size``; ``bos_token_id``, if any, begins every document.

    Attributes:
        eos_token_ids: Ids at which a generated text ends; empty if the model was not trained to end a text.
        stop_strings: Strings at which a generated text ends, as its folder asks for.
        trains_on_all_texts: If True, training needs all training texts; otherwise a sample of them is enough.
    """

    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    trains_on_all_texts: bool = False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of embeddings a model needs: one more than the largest id."""

    @property
    @abstractmethod
    def bos_token_id(self) -> int | None:
        """Id that begins a document and is no text; None if documents begin with their text."""

    @property
    def bos_token_ids(self) -> list[int]:
        """``bos_token_id`` as a list, empty for None."""
        return [] if self.bos_token_id is None else [self.bos_token_id]

    @property
    def pad_id(self) -> int:
        """Id for positions that hold no token: ``bos_token_id``, or 0."""
        return self.bos_token_id or 0

    @abstractmethod
    def encode_chunk(self, chunk: str) -> TokenIds:
        """Return the ids of one chunk, ``(tokens,)`` of an integer dtype; raises DataError for a lone surrogate."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token inside a text (maybe part of a character); empty for special tokens.

        Raises DataError if the id is not below ``vocab_size``.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return the whole tokenizer as JSON text, which :func:`tokenizer_from_json` reads."""

    def word_ids(self, ids: Sequence[int]) -> WordIds:
        """Return the index of each token's word, ``(tokens,)`` int64; special tokens are words of their own.

        Words are those into which the tokenizer splits a text before its tokens, or runs of letters and digits. The
        tokens follow each other in a text, which may begin anywhere.
        """
        return letter_word_ids([self.token_bytes(token_id) for token_id in ids])

    @property
    def is_trained(self) -> bool:
        """True if it can encode; False if it must be trained first."""
        return True

    @property
    def knows_vocab_size(self) -> bool:
        """False if ``vocab_size`` is known only after training."""
        return True

    @property
    def training_options(self) -> str:
        """Options that determine the vocabulary of given texts, as text."""
        return str(self.vocab_size)

    def train(self, texts: Iterable[str]) -> None:  # noqa: B027  (most kinds have nothing to learn)
        """Learn the vocabulary from texts, if there is one to learn; the same texts give the same ids."""

    def train_documents(self, documents: Iterable[Iterable[str]]) -> None:
        """Learn the vocabulary from texts, each in any portions; see :meth:`train`."""
        self.train(text for document in documents for text in document)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`; equal only for tokenizers that give the same ids."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def encoder(self, *, pending: str = "", continues: bool = False, parse_special: bool = False) -> TextEncoder:
        """Return an encoder of one text that arrives in portions.

        Args:
            pending: Text at the start that another encoder held back.
            continues: If True, other text precedes this one, so that no space is put before it.
            parse_special: If True, text that spells a special token becomes that token.
        """
        splitter = TextSplitter()
        splitter.pending = pending
        return ChunkEncoder(splitter, lambda chunks: [self.encode_chunk(chunk.text) for chunk in chunks])

    def encode(self, text: str, *, parse_special: bool = False) -> TokenIds:
        """Return the ids of a text, ``(tokens,)``, without ``bos_token_id``; options as in :meth:`encoder`."""
        return concatenate(list(self.encode_stream([text], parse_special=parse_special)))

    def encode_stream(self, texts: Iterable[str], *, parse_special: bool = False) -> Iterator[TokenIds]:
        """Encode a text that arrives in any portions; the ids joined equal :meth:`encode`."""
        encoder = self.encoder(parse_special=parse_special)
        for text in texts:
            if chunks := encoder.feed(text):
                yield concatenate([chunk.ids for chunk in chunks])
        if chunks := encoder.flush():
            yield concatenate([chunk.ids for chunk in chunks])

    def align(self, encoded: EncodedChunk) -> list[bytes]:
        """Return the bytes of the text that each token of a chunk stands for; they add up to the chunk."""
        return self.token_contents(encoded.ids.tolist(), continues=bool(encoded.chunk.left))

    def token_contents(self, ids: Sequence[int], *, continues: bool) -> list[bytes]:
        """Return the bytes of each token of a text, or of a part of one that ``continues`` other tokens."""
        return [self.token_bytes(token_id) for token_id in ids]

    def decoder(self, *, continues: bool = False, pending: bytes = b"") -> TextDecoder:
        """Return a decoder of the tokens of one text, as they come; the parts joined equal :meth:`decode`.

        Args:
            continues: If True, other tokens precede these, so that the first keeps its space.
            pending: Bytes of an incomplete character before the tokens.
        """
        return Utf8TextDecoder(self.token_bytes, pending)

    def decode(self, ids: Iterable[int], *, complete_only: bool = False) -> str:
        """Return the text of ids, without special tokens; bytes that are not UTF-8 become U+FFFD.

        If ``complete_only``, leave out an incomplete character at the end.
        """
        checked_ids = [int(token_id) for token_id in ids]
        for token_id in checked_ids:
            self._check_token_id(token_id)
        decoder = self.decoder()
        return "".join([*map(decoder.feed, checked_ids), decoder.release() if complete_only else decoder.finish()])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a file, atomically."""
        files.write_text(path, self.to_json())

    def _check_token_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            message = f"Token {token_id} is not in the vocabulary, expected 0 to {self.vocab_size - 1}."
            raise DataError(message, "Use the tokenizer that made it.")


def concatenate(parts: Sequence[TokenIds]) -> TokenIds:
    """Return ids joined, ``(tokens,)``."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)
