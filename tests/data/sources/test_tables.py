from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.sources import tables
from memtx.data.sources.base import Document, SourcePart
from memtx.data.sources.listing import list_files
from memtx.data.sources.tables import TableColumns
from memtx.errors import DataError


def read(parts: list[SourcePart]) -> list[Document]:
    return [document for part in parts for document in part.iter_documents()]


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=40), max_size=12),
    block=st.integers(1, 60),
    chunk=st.integers(1, 50),
    end=st.sampled_from([b"", b"\n", b"\n\n", b"\r\n"]),
)
def test_every_line_is_in_one_part_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int, chunk: int, end: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    raw = b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in lines) + end
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK_BYTES", block)
        patch.setattr(tables, "READ_SIZE", chunk)
        parts = tables.json_lines_parts(list_files(str(path)).files[0], TableColumns()) if raw else []
        documents = read(parts)
    assert [document.text for document in documents] == lines
    offsets = [int(document.id.removeprefix("a.jsonl@")) for document in documents]
    assert [json.loads(raw[offset:].split(b"\n")[0])["text"] for offset in offsets] == lines
    assert sum(part.size for part in parts) == len(raw)


def test_a_compressed_file_is_one_part(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b", "n": 7}\n{"text": null, "n": 8}\n'))
    parts = tables.json_lines_parts(list_files(str(tmp_path / "a.jsonl.gz")).files[0], TableColumns(id="n"))
    assert len(parts) == 1
    assert [(document.id, document.text) for document in read(parts)] == [("7", "a b"), ("8", "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a\.jsonl', byte 14: the line is no JSON"),
        (b"[1]", "byte 14: the line is a list, expected a JSON object"),
        (b'{"txt": "x"}', r"byte 14: there is no 'text'\. Did you mean 'txt'"),
        (b'{"text": 5}', "byte 14: 'text' is a int, expected a text"),
        (b'{"text": "\\ud800"}', "byte 14: The text holds U.D800"),
        (b'{"text": "\xff"}', r"a\.jsonl' is not UTF-8: byte 0xff at byte offset 24"),
        (b"[" * 100_000, "byte 14: the line is no JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(tables.json_lines_parts(list_files(str(tmp_path)).files[0], TableColumns()))


def test_a_line_that_is_too_long_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(tables, "READ_SIZE", 10)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 30)
    long = json.dumps({"text": "x" * 200}) + "\n"
    (tmp_path / "a.jsonl").write_text(long + '{"text": "y"}\n')
    parts = tables.json_lines_parts(list_files(str(tmp_path)).files[0], TableColumns())
    with pytest.raises(DataError, match="byte 0: the line has more than 100 bytes"):
        read(parts[:1])
    # Parts inside the line leave it to the part in which it begins.
    assert [document.text for document in read(parts[1:])] == ["y"]


def parquet(path: Path, **columns: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), path, row_group_size=3)


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=[f"text {number}" for number in range(7)] + [None], key=list(range(8)))
    (file,) = list_files(str(tmp_path)).files
    parts = tables.parquet_parts(file, TableColumns())
    assert len(parts) == 3
    assert [(document.id, document.text) for document in read(parts)] == [
        *((f"a.parquet@{number}", f"text {number}") for number in range(7)),
        ("a.parquet@7", ""),
    ]
    assert [document.id for document in read(tables.parquet_parts(file, TableColumns(id="key")))] == [
        str(number) for number in range(8)
    ]
    with pytest.raises(DataError, match=r"no column 'txt', it has text, key\. Did you mean 'text'.*--text-column"):
        tables.parquet_parts(file, TableColumns("txt"))
    with pytest.raises(DataError, match="row 0: 'key' is a int, expected a text"):
        read(tables.parquet_parts(file, TableColumns("key")))


def test_damaged_parquet_is_reported(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=["some words"] * 100)
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[:-9])
    with pytest.raises(DataError, match=r"a\.parquet' could not be read: ArrowInvalid"):
        tables.parquet_parts(list_files(str(tmp_path)).files[0], TableColumns())
