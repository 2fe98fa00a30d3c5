"""Text in any pieces -> the same pieces always: where a tokenizer may cut is a function of the text alone.

A book arrives as one string, as chunks of a file or as keystrokes; its tokens must not depend on which. So the
text is cut at places found by looking at the text only, and each piece is encoded by itself.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

from memtx.errors import DataError

PARAGRAPH_LIMIT = 1024
"""Characters from which on a piece ends at the first paragraph end."""
SOFT_LIMIT = 4096
"""Characters from which on a piece ends at the first line or word end as well."""
HARD_LIMIT = 8192
"""Characters at which a piece ends whatever stands there."""

# A run of blank lines belongs to the paragraph before it; whether it is over is known one character later.
_PARAGRAPH_END = re.compile(r"\n\r?\n(?=[^\r\n])")
# A line end stays with its line, a space goes with the word after it: byte-level BPE joins them so.
_SOFT_END = re.compile(r"\n(?=[^\r\n])|\S(?= )")


class TextSplitter:
    """Cuts a text that arrives in any portions into pieces that depend on the whole text only.

    A piece ends at the first paragraph end (a run of blank lines) from 1024 characters on, at the first line or
    word end past 4096, and at 8192 characters at the latest. So memory is bounded and time linear, even for one
    line of 50 MB. The pieces joined are the text.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._searched = 0

    @property
    def pending(self) -> str:
        """The text held back: what was fed and is in no piece yet, at most 8192 characters."""
        return self._buffer

    def feed(self, text: str) -> list[str]:
        """Take the next portion of the text and return the pieces that are now complete."""
        buffer, begin, searched = self._buffer + text, 0, self._searched
        pieces: list[str] = []
        while (end := _find_chunk_end(buffer, begin, searched)) is not None:
            pieces.append(buffer[begin:end])
            begin, searched = end, end
        self._buffer = buffer[begin:]
        self._searched = len(self._buffer)
        return pieces

    def flush(self) -> list[str]:
        """End the text: return what was held back as the last piece (none if empty); the splitter is fresh again."""
        pieces = [self._buffer] if self._buffer else []
        self._buffer, self._searched = "", 0
        return pieces


def _find_chunk_end(buffer: str, start: int, searched: int) -> int | None:
    """Return where the piece at ``start`` ends, None if that is not known yet; no end lies before ``searched``."""
    stop = min(len(buffer), start + HARD_LIMIT)
    # A match ending at a given place starts at most three characters before it.
    found = _PARAGRAPH_END.search(buffer, max(start + PARAGRAPH_LIMIT - 3, searched - 3), stop)
    while found and found.end() < start + PARAGRAPH_LIMIT:
        found = _PARAGRAPH_END.search(buffer, found.end(), stop)
    if found and found.end() <= start + SOFT_LIMIT:
        return found.end()
    soft = _SOFT_END.search(buffer, max(start + SOFT_LIMIT, searched - 3), stop)
    ends = [match.end() for match in (found, soft) if match]
    if ends:
        return min(ends)
    return start + HARD_LIMIT if len(buffer) >= start + HARD_LIMIT else None


def split_text(text: str) -> list[str]:
    """Return the pieces of a whole text."""
    splitter = TextSplitter()
    return splitter.feed(text) + splitter.flush()


def decode_utf8(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode UTF-8 that arrives cut anywhere, even inside a character.

    Args:
        chunks: the bytes, in any portions.
        name: where they come from, for the message.

    Raises:
        DataError: the bytes are not UTF-8; names the source and the offset of the first bad byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0

    def decode(chunk: bytes, final: bool) -> str:
        held = len(decoder.getstate()[0])
        try:
            return decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            place = offset - held + error.start
            bad = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(
                f"'{name}' is not UTF-8: {bad} at byte offset {place} ({error.reason}).",
                "Convert it, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW.",
            ) from error

    for chunk in chunks:
        if text := decode(chunk, False):
            yield text
        offset += len(chunk)
    if text := decode(b"", True):
        yield text


class WordCounter:
    """Counts whitespace-separated words and UTF-8 bytes of a text given in pieces: ``len(text.split())`` exactly."""

    def __init__(self) -> None:
        self.num_words = 0
        self.num_bytes = 0
        self._in_word = False

    def update(self, text: str) -> None:
        """Count the next piece; a word cut by the border of two pieces is one word."""
        if not text:
            return
        self.num_words += len(text.split()) - (self._in_word and not text[0].isspace())
        self.num_bytes += len(text.encode("utf-8", errors="surrogatepass"))
        self._in_word = not text[-1].isspace()
