"""Text of tokens as the decoder of a ``tokenizer.json`` spells it, token by token."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from memtx.data.safe_cuts import components
from memtx.errors import DataError

MAX_BYTE_RUN = 64
"""Number of byte tokens in a row after which complete characters are no longer held back."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Decoders by which a token's text depends at most on the token before it and on whether it is the first.
_DECODERS = {"WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "BPEDecoder"}


class TextDecoder(Protocol):
    """Decodes the tokens of one text as they come."""

    def num_chars_before(self, token_id: int) -> int:
        """Return the number of characters that are not returned yet and precede those of a token to be fed."""

    def feed(self, token_id: int) -> str:
        """Return the characters that a token completes."""

    def release(self) -> str:
        """Return the complete characters that are held back; an incomplete one stays."""

    def finish(self) -> str:
        """Return the rest of the text; incomplete characters become U+FFFD."""


def count_broken_chars(pending: bytes, content: bytes) -> int:
    """Return the number of U+FFFD that bytes of an incomplete character become before content that does not go on."""
    goes_on = not content or 0x80 <= content[0] < 0xC0
    return 0 if goes_on else len(pending.decode("utf-8", "replace"))


class Utf8TextDecoder:
    """Decoder for tokens that are UTF-8 bytes; ``pending`` are bytes of an incomplete character before them."""

    def __init__(self, token_bytes: Callable[[int], bytes], pending: bytes = b"") -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((pending, 0))

    def num_chars_before(self, token_id: int) -> int:
        """Return 1 if the token leaves the character before it incomplete, which becomes U+FFFD, and else 0."""
        return count_broken_chars(self._decoder.getstate()[0], self._token_bytes(token_id))

    def feed(self, token_id: int) -> str:
        """Return the characters that a token completes."""
        return self._decoder.decode(self._token_bytes(token_id))

    def release(self) -> str:
        """Return the empty string: no complete character is held back."""
        return ""

    def finish(self) -> str:
        """Return U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", True)


class TokenSpeller:
    """Text of each token of a library tokenizer. Special tokens have none.

    Raises DataError if the text of a token may depend on tokens far from it.
    """

    def __init__(self, backend: Any, description: Mapping[str, Any]) -> None:
        decoders = list(components(description.get("decoder")))
        names = [decoder["type"] for decoder in decoders]
        self._is_byte_level = names == ["ByteLevel"]
        if not self._is_byte_level and not _treats_tokens_alone(decoders):
            message = f"The tokenizer's decoder ({', '.join(names)}) cannot decode a text token by token."
            raise DataError(message, f"Use ByteLevel alone, or some of {', '.join(sorted(_DECODERS))}.")
        self._has_byte_tokens = "ByteFallback" in names
        self._depends_on_previous = "BPEDecoder" in names
        self._id_to_token = backend.id_to_token
        self._join: Callable[[list[str]], str] = backend.decoder.decode if backend.decoder is not None else " ".join
        added_tokens = backend.get_added_tokens_decoder()
        self._special_token_ids = {token_id for token_id, token in added_tokens.items() if token.special}
        self._alphabet = byte_alphabet() if self._is_byte_level else {}
        self._contents: dict[int, bytes] = {}
        self._anchor = "a"  # no token: decoders see spellings only

    def hide(self, token_id: int) -> None:
        """Let a token have no text."""
        self._special_token_ids.add(token_id)

    def spelling(self, token_id: int) -> str | None:
        """Return a token as it stands in the vocabulary; None if it has no text."""
        return None if token_id in self._special_token_ids else self._id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token that follows others; maybe part of a character."""
        if token_id not in self._contents:
            self._contents[token_id] = self._compute_bytes(self.spelling(token_id))
        return self._contents[token_id]

    def first_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token that begins a text: many decoders drop its space."""
        token = self.spelling(token_id)
        if token is None or self._is_byte_level or self.is_byte(token):
            return self.token_bytes(token_id)
        return self._join([token]).encode("utf-8")

    def is_byte(self, token: str) -> bool:
        """Return whether a spelling stands for a byte."""
        return self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token) is not None

    def decoder(self, *, continues: bool, pending: bytes) -> TextDecoder:
        """Return a decoder at the start of a text, or inside it, after ``pending`` bytes of an incomplete character."""
        if self._is_byte_level:
            return Utf8TextDecoder(self.token_bytes, pending)
        return _SpellingDecoder(self, continues, pending)

    def join(self, tokens: Sequence[str], previous: str | None, *, is_start: bool) -> str:
        """Return the text of spelled tokens, at the start of a text or after a token."""
        if is_start:
            return self._join(list(tokens))
        before = previous if self._depends_on_previous and previous is not None else self._anchor
        return self._join([before, *tokens])[len(self._join([before])) :]

    def _compute_bytes(self, token: str | None) -> bytes:
        if token is None:
            return b""
        if self._is_byte_level:
            # The library takes a token with other letters as it is.
            if all(letter in self._alphabet for letter in token):
                return bytes(self._alphabet[letter] for letter in token)
            return token.encode("utf-8")
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._depends_on_previous:  # a word's last token ends with the space after the word
            return self._join([token, self._anchor])[: -len(self._join([self._anchor]))].encode("utf-8")
        return self.join([token], None, is_start=False).encode("utf-8")


class _SpellingDecoder:
    """Decoder by the library's own, from a few tokens at a time.

    Byte tokens in a row are decoded together, because the library replaces each of them by U+FFFD if one is wrong.
    """

    def __init__(self, speller: TokenSpeller, continues: bool, pending: bytes) -> None:
        self._speller = speller
        self._head: list[str] | None = None if continues else []  # tokens of a text that has no character yet
        self._run = [f"<0x{byte:02X}>" for byte in pending]
        self._previous: str | None = None

    def num_chars_before(self, token_id: int) -> int:
        """Return the number of characters in the byte tokens that are held back.

        Before another byte token, an incomplete one does not count; before any other, each wrong byte is U+FFFD.
        """
        token = self._speller.spelling(token_id)
        if not self._run or token is None or self._speller.is_byte(token):
            return len(self._run_bytes().decode("utf-8", "ignore"))
        tokens, is_start = [*(self._head or ()), *self._run], self._head is not None
        return len(self._speller.join(tokens, self._previous, is_start=is_start))

    def feed(self, token_id: int) -> str:
        """Return the characters that a token completes."""
        token = self._speller.spelling(token_id)
        if token is None:
            return ""
        if not self._speller.is_byte(token):
            return self.finish() + self._decode([token])
        self._run.append(token)
        if len(self._run) < MAX_BYTE_RUN:
            return ""
        try:
            self._run_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return "" if len(self._run) < 2 * MAX_BYTE_RUN else self.finish()
        return self.finish()

    def release(self) -> str:
        """Return the complete characters of the byte tokens held back, all of them if they are no text."""
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            decoder.decode(self._run_bytes())
        except UnicodeDecodeError:
            return self.finish()
        end = len(self._run) - len(decoder.getstate()[0])
        run, self._run = self._run[:end], self._run[end:]
        return self._decode(run) if run else ""

    def finish(self) -> str:
        """Return the text of the byte tokens held back."""
        run, self._run = self._run, []
        return self._decode(run) if run else ""

    def _run_bytes(self) -> bytes:
        return bytes(int(token[3:5], 16) for token in self._run)

    def _decode(self, tokens: list[str]) -> str:
        previous, self._previous = self._previous, tokens[-1]
        if self._head is None:
            return self._speller.join(tokens, previous, is_start=False)
        self._head += tokens
        if text := self._speller.join(self._head, None, is_start=True):
            self._head = None
        return text


def _treats_tokens_alone(decoders: Sequence[Mapping[str, Any]]) -> bool:
    names = [decoder["type"] for decoder in decoders]
    fused = names[names.index("Fuse") + 1 :] if "Fuse" in names else []
    strips_end = any(decoder["type"] == "Strip" and decoder.get("stop") for decoder in decoders)
    return set(names) <= _DECODERS and set(fused) <= {"Strip"} and not (fused and strips_end)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of the 256 bytes: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
