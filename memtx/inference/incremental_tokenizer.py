"""Incremental tokenization: the tokens of a text do not depend on the chunks in which it arrives."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memtx.data.text_chunks import TextSplitter
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError

CHUNK_SIZE = 1 << 16
"""Characters or bytes processed at a time, so that a huge input is not copied at once."""


class IncrementalTokenizer:
    """Tokenizes a text that arrives in chunks split anywhere, even inside a character.

    Text is pending while its tokens depend on the text that follows; its size is bounded, even in very long lines.

    ``pending_text``, ``pending_bytes`` and ``bytes_consumed`` continue from another tokenizer; errors report offsets in
    the whole text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, pending_text: str = "", pending_bytes: bytes = b"", bytes_consumed: int = 0
    ) -> None:
        self.tokenizer, self.bytes_consumed = tokenizer, bytes_consumed
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._decoder.setstate((pending_bytes, 0))
        self._splitter = TextSplitter()
        # Splits depend on the text alone, so a new splitter holds back exactly this text again.
        complete = self._splitter.feed(pending_text)
        assert not complete, "pending text holds a complete chunk"

    @property
    def pending_text(self) -> str:
        """Text consumed but not encoded yet."""
        return self._splitter.pending

    @property
    def pending_bytes(self) -> bytes:
        """Bytes of an incomplete character, at most 3."""
        return self._decoder.getstate()[0]

    def _encode(self, chunks: list[str]) -> NDArray[np.int64]:
        encoded = [np.asarray(self.tokenizer.encode_chunk(chunk), dtype=np.int64) for chunk in chunks]
        return np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int64)

    def _decode(self, data: bytes, final: bool = False) -> str:
        start = self.bytes_consumed - len(self.pending_bytes)
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            message = f"The text is not UTF-8: {error.reason} at byte {start + error.start}."
            raise DataError(message, "Convert it, for example with iconv.") from error
        self.bytes_consumed += len(data)
        return text

    def feed(self, text: str | bytes) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Consume text and yield each decoded part with the tokens that it completes, ``(length,)`` int64.

        Raises DataError with the offset of the first invalid byte if the bytes are not UTF-8.
        """
        for start in range(0, len(text), CHUNK_SIZE):
            part = text[start : start + CHUNK_SIZE]
            if isinstance(part, bytes):
                decoded = self._decode(part)
            else:
                if self.pending_bytes:
                    message = f"Text follows an incomplete character at byte {self.bytes_consumed}."
                    raise DataError(message, "Feed the rest of its bytes first.")
                decoded = part
                self.bytes_consumed += len(part.encode("utf-8", "surrogatepass"))
            yield decoded, self._encode(self._splitter.feed(decoded))

    def finish(self) -> NDArray[np.int64]:
        """Return the tokens of the pending text, ``(length,)`` int64; raises DataError if a character is incomplete."""
        if self.pending_bytes:
            self._decode(b"", final=True)
        return self._encode(self._splitter.flush())
