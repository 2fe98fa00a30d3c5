"""Text that arrives in any pieces -> tokens that do not depend on how it was cut.

Bytes may be cut inside a character, and text inside a word: what cannot be settled yet waits. What waits is
bounded, however long a line is.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memtx.data.text_chunks import TextSplitter
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError

CHUNK_SIZE = 1 << 16
"""Characters or bytes taken at a time, so that one huge piece is worked off without being copied whole."""


class IncrementalTokenizer:
    """Tokens of one text.

    Args:
        tokenizer: encodes what the splitter lets through.
        pending_text: text of another IncrementalTokenizer that waits to be encoded, to go on from there.
        pending_bytes: its incomplete character, likewise.
        bytes_consumed: bytes it had taken, so that an error names the place in the whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, pending_text: str = "", pending_bytes: bytes = b"", bytes_consumed: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.bytes_consumed = bytes_consumed
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._decoder.setstate((pending_bytes, 0))
        self._splitter = TextSplitter()
        # Where a piece ends depends on its text alone, so a new splitter holds back just what the old one did.
        complete = self._splitter.feed(pending_text)
        assert not complete, "text that waits is no whole piece"

    @property
    def pending_text(self) -> str:
        """Text taken but not encoded yet."""
        return self._splitter.pending

    @property
    def pending_bytes(self) -> bytes:
        """The bytes of a character whose rest has not come, at most 3."""
        return self._decoder.getstate()[0]

    def _encode(self, chunks: list[str]) -> NDArray[np.int64]:
        parts = [np.asarray(self.tokenizer.encode_chunk(piece), dtype=np.int64) for piece in chunks]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _decode(self, data: bytes, final: bool = False) -> str:
        kept = len(self.pending_bytes)
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            offset = self.bytes_consumed - kept + error.start
            raise DataError(
                f"The text is not UTF-8: {error.reason} at byte {offset}.", "Convert it, for example with iconv."
            ) from error
        self.bytes_consumed += len(data)
        return text

    def feed(self, text: str | bytes) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Take more of the text.

        Args:
            text: any amount, cut anywhere; bytes are UTF-8.

        Yields:
            Parts of the text as taken (decoded), each with the tokens that became certain by it: (n,) int64.

        Raises:
            DataError: not UTF-8; names the offset of the first bad byte.
        """
        for start in range(0, len(text), CHUNK_SIZE):
            part = text[start : start + CHUNK_SIZE]
            if isinstance(part, bytes):
                decoded = self._decode(part)
            else:
                if self.pending_bytes:
                    raise DataError(
                        f"The text goes on after an incomplete character at byte {self.bytes_consumed}.",
                        "Feed the rest of its bytes first.",
                    )
                decoded = part
                self.bytes_consumed += len(part.encode("utf-8", "surrogatepass"))
            yield decoded, self._encode(self._splitter.feed(decoded))

    def finish(self) -> NDArray[np.int64]:
        """Return the tokens of what waits, (n,) int64: the text ends here.

        Raises:
            DataError: it ends inside a character.
        """
        if self.pending_bytes:
            self._decode(b"", final=True)
        return self._encode(self._splitter.flush())

    def fork(self) -> IncrementalTokenizer:
        """Return an independent copy that goes on from the same place."""
        return IncrementalTokenizer(
            self.tokenizer,
            pending_text=self.pending_text,
            pending_bytes=self.pending_bytes,
            bytes_consumed=self.bytes_consumed,
        )
