"""Splitting of text into chunks by the text alone, so that its tokens do not depend on how it arrives."""

from __future__ import annotations

import re

PARAGRAPH_LIMIT = 1024  # characters after which a chunk ends at the next paragraph end
SOFT_LIMIT = 4096  # characters after which a chunk also ends at the next line or word end
HARD_LIMIT = 8192  # characters at which a chunk ends in any case

# Blank lines belong to the paragraph before them; whether they are over is known one character later.
_PARAGRAPH_END = re.compile(r"\n\r?\n(?=[^\r\n])")
# A line end stays with its line, a space goes with the word after it: byte-level BPE joins them so.
_SOFT_END = re.compile(r"\n(?=[^\r\n])|\S(?= )")


class TextSplitter:
    """Splits a text that arrives in any portions into chunks that depend on the whole text only.

    A chunk ends at the first paragraph end (a run of blank lines) from 1024 characters on, at the first line or word
    end past 4096, and at 8192 characters at the latest. So memory is bounded and time linear, even for one line of 50
    MB. The chunks joined are the text.
    """

    def __init__(self) -> None:
        self.pending = ""  # text that was fed and is in no chunk yet, at most 8192 characters

    def feed(self, text: str) -> list[str]:
        """Take the next portion of the text and return the chunks that are now complete."""
        buffer, start, searched = self.pending + text, 0, len(self.pending)
        chunks: list[str] = []
        while (end := _find_chunk_end(buffer, start, searched)) is not None:
            chunks.append(buffer[start:end])
            start, searched = end, end
        self.pending = buffer[start:]
        return chunks

    def flush(self) -> list[str]:
        """End the text: return the pending text as the last chunk (none if empty) and start afresh."""
        chunks = [self.pending] if self.pending else []
        self.pending = ""
        return chunks


def _find_chunk_end(buffer: str, start: int, searched: int) -> int | None:
    """Return the end of the chunk at ``start``, None if it is not known yet; no end lies before ``searched``."""
    stop = min(len(buffer), start + HARD_LIMIT)
    # A match that ends at some index starts at most three characters before it.
    paragraph = _PARAGRAPH_END.search(buffer, max(start + PARAGRAPH_LIMIT - 3, searched - 3), stop)
    while paragraph and paragraph.end() < start + PARAGRAPH_LIMIT:
        paragraph = _PARAGRAPH_END.search(buffer, paragraph.end(), stop)
    if paragraph and paragraph.end() <= start + SOFT_LIMIT:
        return paragraph.end()
    soft = _SOFT_END.search(buffer, max(start + SOFT_LIMIT, searched - 3), stop)
    if ends := [match.end() for match in (paragraph, soft) if match]:
        return min(ends)
    return start + HARD_LIMIT if len(buffer) >= start + HARD_LIMIT else None


def split_text(text: str) -> list[str]:
    """Return the chunks of a whole text."""
    splitter = TextSplitter()
    return splitter.feed(text) + splitter.flush()


class WordCounter:
    """Counts whitespace-separated words, exactly ``len(text.split())``, and UTF-8 bytes of a text given in portions."""

    def __init__(self) -> None:
        self.num_words = 0
        self.num_bytes = 0
        self._in_word = False

    def update(self, text: str) -> None:
        """Count the next portion; a word that is cut between two portions is one word."""
        if not text:
            return
        self.num_words += len(text.split()) - (self._in_word and not text[0].isspace())
        self.num_bytes += len(text.encode("utf-8", errors="surrogatepass"))
        self._in_word = not text[-1].isspace()
