"""Incremental tokenization: the tokens of a text do not depend on the chunks in which it arrives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memtx.data.encodings import Utf8Decoder
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
        self.tokenizer = tokenizer
        self._decoder = Utf8Decoder("The text", bytes_consumed, pending_bytes)
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
        return self._decoder.pending

    @property
    def bytes_consumed(self) -> int:
        """Bytes of the text consumed, with a byte order mark and an incomplete character."""
        return self._decoder.offset

    def _encode(self, chunks: list[str]) -> NDArray[np.int64]:
        encoded = [np.asarray(self.tokenizer.encode_chunk(chunk), dtype=np.int64) for chunk in chunks]
        return np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int64)

    def feed(self, text: str | bytes) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Consume text and yield each decoded part with the tokens that it completes, ``(length,)`` int64.

        Raises DataError with the offset of the first byte that is not UTF-8 or is NUL.
        """
        for start in range(0, len(text), CHUNK_SIZE):
            part = text[start : start + CHUNK_SIZE]
            if isinstance(part, bytes):
                decoded = self._decoder.decode(part)
            else:
                if self.pending_bytes:
                    message = f"Text follows an incomplete character at byte {self.bytes_consumed}."
                    raise DataError(message, "Feed the rest of its bytes first.")
                decoded = part
                self._decoder.offset += len(part.encode("utf-8", "surrogatepass"))
            yield decoded, self._encode(self._splitter.feed(decoded))

    def finish(self) -> NDArray[np.int64]:
        """Return the tokens of the pending text, ``(length,)`` int64; raises DataError if a character is incomplete."""
        if self.pending_bytes:
            self._decoder.decode(b"", final=True)
        return self._encode(self._splitter.flush())
