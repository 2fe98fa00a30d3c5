"""Incremental tokenization: the tokens of a text do not depend on the chunks in which it arrives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memtx.data.base_tokenizer import EncodedChunk, Tokenizer
from memtx.data.encodings import Utf8Decoder
from memtx.errors import DataError

CHUNK_SIZE = 1 << 16
"""Characters or bytes processed at a time, so that a huge input is not copied at once."""


class TokenizedText(NamedTuple):
    """Tokens of a part of a text: ids, ``(length,)`` int64, and the bytes of the text that each stands for."""

    ids: NDArray[np.int64]
    contents: Sequence[bytes]


class IncrementalTokenizer:
    """Tokenizes a text that arrives in chunks split anywhere, even inside a character.

    Text is pending while its tokens depend on the text that follows.

    ``pending_text``, ``pending_bytes`` and ``bytes_consumed`` continue from another tokenizer; errors report offsets in
    the whole text. If ``continues``, other text or tokens precede, so that no space is put before the text. If
    ``parse_special``, text that spells a special token becomes that token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pending_text: str = "",
        pending_bytes: bytes = b"",
        bytes_consumed: int = 0,
        continues: bool = False,
        parse_special: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._decoder = Utf8Decoder("The text", bytes_consumed, pending_bytes)
        options = {"continues": continues, "parse_special": parse_special}
        self._encoder = tokenizer.encoder(pending=pending_text, **options)

    @property
    def pending_text(self) -> str:
        """Text consumed but not encoded yet."""
        return self._encoder.pending

    @property
    def pending_bytes(self) -> bytes:
        """Bytes of an incomplete character, at most 3."""
        return self._decoder.pending

    @property
    def bytes_consumed(self) -> int:
        """Bytes of the text consumed, with a byte order mark and an incomplete character."""
        return self._decoder.offset

    def _to_tokens(self, chunks: Sequence[EncodedChunk]) -> TokenizedText:
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(chunk.ids for chunk in chunks)], dtype=np.int64)
        return TokenizedText(ids, [content for chunk in chunks for content in self.tokenizer.align(chunk)])

    def feed(self, text: str | bytes) -> Iterator[tuple[str, TokenizedText]]:
        """Consume text and yield each decoded part with the tokens that it completes.

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
            yield decoded, self._to_tokens(self._encoder.feed(decoded))

    def finish(self) -> TokenizedText:
        """Return the tokens of the pending text, which later text continues; raises DataError inside a character."""
        if self.pending_bytes:
            self._decoder.decode(b"", final=True)
        return self.flush()

    def flush(self) -> TokenizedText:
        """Return the tokens of the pending text, which ends here; an incomplete character stays pending."""
        return self._to_tokens(self._encoder.flush())
