"""Text that arrives in any pieces -> tokens that do not depend on how it was cut.

Bytes may be cut inside a character, and text inside a word: what cannot be settled yet waits. What waits is
bounded, however long a line is.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memtx.data.pieces import Splitter
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError

STEP = 1 << 16
"""Characters or bytes taken at a time, so that one huge piece is worked off without being copied whole."""


class TextPieces:
    """Tokens of one text.

    Args:
        tokenizer: encodes what the splitter lets through.
        waiting: text of another TextPieces that waits to be encoded, to go on from there.
        waiting_bytes: its incomplete character, likewise.
        taken_bytes: bytes it had taken, so that an error names the place in the whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, waiting: str = "", waiting_bytes: bytes = b"", taken_bytes: int = 0
    ) -> None:
        self.tokenizer = tokenizer
        self.taken_bytes = taken_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._decoder.setstate((waiting_bytes, 0))
        self._splitter = Splitter()
        # Where a piece ends depends on its text alone, so a new splitter holds back just what the old one did.
        complete = self._splitter.feed(waiting)
        assert not complete, "text that waits is no whole piece"

    @property
    def waiting(self) -> str:
        """Text taken but not encoded yet."""
        return self._splitter.pending

    @property
    def waiting_bytes(self) -> bytes:
        """The bytes of a character whose rest has not come, at most 3."""
        return self._decoder.getstate()[0]

    def _encoded(self, pieces: list[str]) -> NDArray[np.int64]:
        parts = [np.asarray(self.tokenizer.encode_piece(piece), dtype=np.int64) for piece in pieces]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _decode(self, part: bytes, final: bool = False) -> str:
        kept = len(self.waiting_bytes)
        try:
            text = self._decoder.decode(part, final)
        except UnicodeDecodeError as error:
            offset = self.taken_bytes - kept + error.start
            raise DataError(
                f"The text is not UTF-8: {error.reason} at byte {offset}.", "Convert it, for example with iconv."
            ) from error
        self.taken_bytes += len(part)
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
        for start in range(0, len(text), STEP):
            part = text[start : start + STEP]
            if isinstance(part, bytes):
                decoded = self._decode(part)
            else:
                if self.waiting_bytes:
                    raise DataError(
                        f"The text goes on after an incomplete character at byte {self.taken_bytes}.",
                        "Feed the rest of its bytes first.",
                    )
                decoded = part
                self.taken_bytes += len(part.encode("utf-8", "surrogatepass"))
            yield decoded, self._encoded(self._splitter.feed(decoded))

    def finish(self) -> NDArray[np.int64]:
        """Return the tokens of what waits, (n,) int64: the text ends here.

        Raises:
            DataError: it ends inside a character.
        """
        if self.waiting_bytes:
            self._decode(b"", final=True)
        return self._encoded(self._splitter.finish())

    def fork(self) -> TextPieces:
        """Return an independent copy that goes on from the same place."""
        return TextPieces(
            self.tokenizer,
            waiting=self.waiting,
            waiting_bytes=self.waiting_bytes,
            taken_bytes=self.taken_bytes,
        )
