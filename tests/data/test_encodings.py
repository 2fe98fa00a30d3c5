"""UTF-8 in any portions, and advice on other encodings."""

# ruff: noqa: RUF001
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.encodings import decode_utf8
from memtx.data.sources.corpus import open_corpus
from memtx.errors import DataError

# No NUL, which is refused, and no byte order mark, which is dropped.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"))


def blocks(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


@settings(deadline=None, max_examples=60)
@given(TEXT, st.integers(1, 7), st.sampled_from([0, 5]), st.booleans())
def test_utf8_decodes_in_any_portions(text: str, size: int, offset: int, has_mark: bool) -> None:
    raw = ("\ufeff" if has_mark else "").encode() + text.encode()
    # The mark of a file is no text; anywhere else it is a character.
    expected = "\ufeff" + text if has_mark and offset else text
    assert "".join(decode_utf8(blocks(raw, size), "'a'", offset)) == expected


@settings(deadline=None, max_examples=60)
@given(
    TEXT, st.sampled_from([b"\xff", b"\xe9\n", b"\xc3", b"\xed\xa0\x80", b"\0"]), st.integers(1, 7), st.integers(0, 9)
)
def test_the_first_bad_byte_is_named(text: str, bad: bytes, size: int, offset: int) -> None:
    raw = text.encode() + bad
    position = offset + len(text.encode())
    with pytest.raises(DataError, match=rf"'book.txt' (is not UTF-8|holds a NUL byte).* byte offset {position}[ ,]"):
        list(decode_utf8(blocks(raw, size), "'book.txt'", offset))


TEXTS = {
    "他在那个时候说的话，我们都不知道是不是真的。中国的历史很长，人们来到这里。\n": [
        ("gb18030", "GB18030"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
    ],
    "他在那個時候說的話，我們都不知道是不是真的。": [("big5", "BIG5"), ("utf-16-le", "UTF-16LE")],
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。": [
        ("shift_jis", "SHIFT_JIS"),
        ("euc_jp", "EUC-JP"),
    ],
    "나는 학교에 갑니다. 이것은 한국어로 된 글이며 사람들이 읽는 책이다.": [("euc_kr", "EUC-KR")],
    "Все счастливые семьи похожи друг на друга.": [
        ("cp1251", "WINDOWS-1251"),
        ("koi8-r", "KOI8-R"),
        ("cp866", "CP866"),
    ],
    "一个人在中国，一天。\n": [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")],
    "Święta były długie i ciężkie, a książki ciekawe jak zawsze.": [
        ("cp1250", "WINDOWS-1250"),
        ("iso8859-2", "ISO-8859-2"),
    ],
    "Všichni lidé se rodí svobodní a sobě rovní co do důstojnosti a práv.": [
        ("cp1250", "WINDOWS-1250"),
        ("iso8859-2", "ISO-8859-2"),
    ],
    "Διαβάζουμε βιβλία και γράφουμε γράμματα.": [("cp1253", "WINDOWS-1253")],
    "אנחנו קוראים ספרים והם כותבים מכתבים.": [("cp1255", "WINDOWS-1255")],
    "Die Größe der Straße überraschte; schöne Grüße aus München.": [("latin1", "LATIN1")],
    "Où êtes-vous né? Là-bas, près de la forêt, après l'été; ça va, père.": [("latin1", "LATIN1")],
    "Longtemps, je me suis couché de bonne heure. À peine ma bougie éteinte.": [("latin1", "LATIN1")],
    "“It’s a truth universally acknowledged” – said he…": [
        ("cp1252", "WINDOWS-1252"),
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-32", "UTF-32"),
    ],
}


@pytest.mark.parametrize("front", ["", "A title in English.\n\n" * 9], ids=["", "after English"])
@pytest.mark.parametrize(
    ("text", "codec", "name"), [(text, *names) for text, pairs in TEXTS.items() for names in pairs], ids=str
)
def test_the_advice_names_the_encoding(text: str, codec: str, name: str, front: str, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes((front + text * 3).encode(codec))
    with pytest.raises(DataError, match=f"iconv -f {name} -t UTF-8") as caught:
        list(decode_utf8([path.read_bytes()], f"'{path}'"))
    command = f"iconv -f {name} -t UTF-8 {path}"
    assert command.replace(str(path), "FILE") in str(caught.value)
    converted = subprocess.run(command.split(), capture_output=True, check=True).stdout
    assert "".join(decode_utf8([converted], "'new'")) == front + text * 3


@pytest.mark.parametrize("raw", [b"\x80\x81\x82 word", b"a\xff\xfe\xfd", b"\xe9"], ids=repr)
def test_no_encoding_is_named_without_evidence(raw: bytes) -> None:
    with pytest.raises(DataError, match="Find out its encoding"):
        list(decode_utf8([raw], "'a'"))


def test_binary_files_are_refused() -> None:
    with pytest.raises(DataError, match=r"holds a NUL byte at byte offset 4.*It looks binary"):
        list(decode_utf8([b"\x7fELF\0\0\0\1\2\0\3\0\0\0\0"], "'a'"))


def test_the_offset_of_a_bad_byte_is_that_of_the_file(tmp_path: Path) -> None:
    raw = b"A line of some words.\n" * 1000
    (tmp_path / "book.txt").write_bytes(raw[:-50] + b"\xe9" + raw[-50:])
    corpus = open_corpus(tmp_path / "book.txt")
    assert "\ufffd" not in corpus.get_split("train")[0].read()
    with pytest.raises(DataError, match=f"byte 0xe9 at byte offset {len(raw) - 50} "):
        corpus.get_split("test")[0].read()
