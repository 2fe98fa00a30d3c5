"""Decoding of UTF-8, and advice on texts in another encoding."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

from memtx.errors import DataError

SAMPLE_BYTES = 1 << 16  # of a text from its bad byte on, for the guess of its encoding
# Share of the characters outside ASCII that must be common ones: of an alphabet, and of thousands of characters, of
# which a wrong encoding reaches about 0.02.
MIN_ALPHABET_SHARE, MIN_SHARE = 0.5, 0.08

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CHINESE = "的一是不了在人有我他中大上到就出可也，。"  # noqa: RUF001
_SIMPLIFIED, _TRADITIONAL = _CHINESE + "这来个们说时会", _CHINESE + "這來個們說時會"
_KANA = "のにはをたがでてとしれさいるなかもこうっまよ、。"
_HANGUL = "이다는의에가을를로고하은지도한서니아나"
_CYRILLIC, _GREEK, _HEBREW = "оеаинтсрвлкмдпу", "αοιετσνηυρπκμλςά", "יולהאמרשתבנכםד"
_POLISH, _CZECH = "ąćęłńóśźżĄĆĘŁŃÓŚŹŻ", "áčďéěíňóřšťúůýžÁČĎÉĚÍŇÓŘŠŤÚŮÝŽ"
_LATIN = "éèêëàâäáãåæçñìíîïòóôöõøùúûüýßÉÖÜÄÅÆØ°§«»¿¡"
# Names for iconv, and characters that are common in their texts.
_COMMON_CHARACTERS = [
    ("GB18030", _SIMPLIFIED),
    ("BIG5", _TRADITIONAL),
    ("SHIFT_JIS", _KANA),
    ("EUC-JP", _KANA),
    ("EUC-KR", _HANGUL),
    ("UTF-16LE", _SIMPLIFIED + _TRADITIONAL + _KANA + _HANGUL),
    ("UTF-16BE", _SIMPLIFIED + _TRADITIONAL + _KANA + _HANGUL),
    ("WINDOWS-1251", _CYRILLIC),
    ("KOI8-R", _CYRILLIC),
    ("CP866", _CYRILLIC),
    ("WINDOWS-1253", _GREEK),
    ("WINDOWS-1255", _HEBREW),
    ("LATIN1", _LATIN),
    ("WINDOWS-1252", _LATIN + "’‘“”–—…€œ"),  # noqa: RUF001
    ("WINDOWS-1250", _POLISH),
    ("WINDOWS-1250", _CZECH),
    ("ISO-8859-2", _POLISH),
    ("ISO-8859-2", _CZECH),
]


class Utf8Decoder:
    """Decodes UTF-8 in any portions, even cut inside a character; a byte order mark at offset 0 is dropped.

    Args:
        name: Name of the text for messages.
        offset: Bytes of the file before the first portion. Defaults to 0.
        pending: First bytes of a character, just before ``offset``. Defaults to none.
    """

    def __init__(self, name: str, offset: int = 0, pending: bytes = b"") -> None:
        self.name, self.offset, self.pending = name, offset, pending

    def decode(self, block: bytes, final: bool = False) -> str:
        """Return the text of a portion, all of it if ``final``.

        Raises DataError with the offset of the first byte that is not UTF-8 or is NUL.
        """
        start, block = self.offset - len(self.pending), self.pending + block
        try:
            text, length = codecs.utf_8_decode(block, "strict", final)
        except UnicodeDecodeError as error:
            reason = f"byte 0x{block[error.start]:02x} at byte offset {start + error.start} ({error.reason})"
            raise self._error(f"is not UTF-8: {reason}", block, start, error.start) from error
        if "\0" in text:
            bad_byte = block.index(0)
            reason = f"holds a NUL byte at byte offset {start + bad_byte}, expected a text in UTF-8"
            raise self._error(reason, block, start, bad_byte)
        self.offset, self.pending = start + len(block), block[length:]
        return text.removeprefix("\ufeff") if start == 0 else text

    def _error(self, problem: str, block: bytes, block_offset: int, bad_byte: int) -> DataError:
        # From an even offset and a bit before the bad byte, so that pairs of bytes stay together.
        start = max(0, bad_byte - 64)
        start += (block_offset + start) % 2
        sample = block[start : start + SAMPLE_BYTES]
        encoding = guess_encoding(sample, is_start=block_offset + start == 0)
        if encoding is not None:
            hint = f"It looks like {encoding}; convert it with iconv -f {encoding} -t UTF-8 FILE > NEW."
        elif 0 in sample:
            hint = "It looks binary; remove it, or give its text."
        else:
            hint = "Find out its encoding and convert it with iconv -f ENCODING -t UTF-8 FILE > NEW."
        return DataError(f"{self.name} {problem}.", hint)


def decode_utf8(blocks: Iterable[bytes], name: str, offset: int = 0) -> Iterator[str]:
    """Decode the portions of a text that begins at ``offset`` of a file; see :class:`Utf8Decoder`."""
    decoder = Utf8Decoder(name, offset)
    for block in blocks:
        if text := decoder.decode(block):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def guess_encoding(sample: bytes, *, is_start: bool) -> str | None:
    """Return the name for iconv of the encoding of a text that is not UTF-8, or None if it is not evident.

    Args:
        sample: Part of the text from an even offset.
        is_start: If True, the part begins the file.
    """
    for mark, name in _BYTE_ORDER_MARKS if is_start else ():
        if sample.startswith(mark):
            return name
    if zeros := sample.count(0):
        # Line ends and spaces have a zero byte in UTF-16, always the same one of the two.
        num_low, num_high = sample[0::2].count(0), sample[1::2].count(0)
        name = "UTF-16LE" if num_high > num_low else "UTF-16BE"
        text = sample[: len(sample) // 2 * 2].decode(name, "ignore")
        num_printable = sum(letter.isprintable() or letter.isspace() for letter in text)
        if max(num_low, num_high) > 0.9 * zeros and num_printable > 0.95 * (len(sample) // 2):
            return name
    shares = [
        (_share_of_common(sample, name, common), name)
        for name, common in _COMMON_CHARACTERS
        if not zeros or name.startswith("UTF-16")  # also of some Chinese characters a byte is zero
    ]
    share, name = max(shares, key=lambda pair: pair[0])
    return name if share > 0 else None


def _share_of_common(sample: bytes, encoding: str, common: str) -> float:
    """Return the share of the characters outside ASCII that are common ones; 0 if they are too few for the encoding."""
    try:
        # Incremental, because the sample may end inside a character.
        text = codecs.getincrementaldecoder(encoding)("strict").decode(sample)
    except UnicodeDecodeError:
        return 0.0
    others = [letter for letter in text if letter > "\x7f"]
    num_ascii = sum(letter.isascii() and letter.isalpha() for letter in text)
    is_latin = "ó" in common
    is_alphabet = is_latin or common in (_CYRILLIC, _GREEK, _HEBREW)
    # Accents stand beside other letters and are fewer; letters of another alphabet stand beside each other.
    num_mixed = len(re.findall(r"[a-zA-Z](?=[^\x00-\x7f])|[^\x00-\x7f](?=[a-zA-Z])", text))
    is_unlikely = len(others) > num_ascii / 2 if is_latin else is_alphabet and num_mixed > len(others) / 4
    if any("\x80" <= letter < "\xa0" for letter in others) or is_unlikely or (len(others) < 4 and not is_latin):
        return 0.0
    share = sum(letter in common for letter in others) / max(1, len(others))
    return share if share >= (MIN_ALPHABET_SHARE if is_alphabet else MIN_SHARE) else 0.0


def encode_utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of a text; raises DataError for half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"The text holds U+{ord(text[error.start]):04X}, half of a surrogate pair, which is no character."
        raise DataError(message, "Remove it, or decode the source as UTF-16.") from error
