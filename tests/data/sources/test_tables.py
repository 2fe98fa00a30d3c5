from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.books import BookDataModule
from memtx.data.sources import tables
from memtx.data.sources.base import Document, SourcePart
from memtx.data.sources.corpus import open_corpus
from memtx.data.sources.listing import list_files
from memtx.data.sources.tables import TableColumns
from memtx.errors import DataError, MemtxError


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


def table(folder: Path, name: str, raw: bytes) -> list[Document]:
    (folder / name).write_bytes(raw)
    return read(list(tables.table_parts(list_files(str(folder / name)).files[0], TableColumns())))


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), min_size=1, max_size=9),
    chunk=st.integers(1, 50),
    layout=st.sampled_from(["array", "indented", "lines", "one after another"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_json_is_an_array_or_objects_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int, layout: str, mark: bytes
) -> None:
    records = [{"n": [1, {"a": "]"}], "text": text} for text in texts]
    dump = json.dumps(records, indent=1 if layout == "indented" else None, ensure_ascii=False)
    if layout in ("lines", "one after another"):
        separator, indent = ("\n", None) if layout == "lines" else (" ", 2)
        dump = separator.join(json.dumps(record, indent=indent) for record in records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "READ_SIZE", chunk)
        documents = table(tmp_path_factory.mktemp("json"), "a.json", mark + dump.encode())
    assert [(document.id, document.text) for document in documents] == [
        (f"a.json@{row}", text) for row, text in enumerate(texts)
    ]


@given(
    texts=st.lists(st.text(st.sampled_from('a,b"\t\n é'), min_size=1, max_size=20), max_size=9),
    chunk=st.integers(1, 50),
    ending=st.sampled_from([".csv", ".tsv"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_csv_is_read_as_the_csv_module_writes_it(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int, ending: str, mark: bytes
) -> None:
    path = tmp_path_factory.mktemp("csv") / f"a{ending}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="," if ending == ".csv" else "\t")
        writer.writerows([["id", "text"], *([str(index), text] for index, text in enumerate(texts))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "READ_SIZE", chunk)
        documents = table(path.parent, path.name, mark + path.read_bytes())
    assert [document.text for document in documents] == texts


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.json", b'[{"text": "x"}', r"a\.json', row 1: no JSON: the array is not closed"),
        ("a.json", b'[{"text": "x"}, {"text": ', "row 1: no JSON: Expecting value"),
        ("a.json", b'[{"text": "x"}] 5', "row 1: the value is a int, expected a JSON object"),
        ("a.json", b'["x"]', "row 0: the value is a str, expected a JSON object"),
        ("a.json", b'{"data": []}', "row 0: there is no 'text'"),
        ("a.json", b'{"text": ["x"]}', "row 0: 'text' is a list, expected a text"),
        ("a.json", b'{"text": "x\\u0000"}', "row 0: 'text' holds a NUL character"),
        ("a.json", '[{"text": "x"}]'.encode("utf-16"), "is not UTF-8.*iconv -f UTF-16 "),
        ("a.json", b"[" * 100_000, "row 0: the value is a list|no JSON"),
        ("a.csv", b"id,txt\n1,x\n", r"has no column 'text', it has id, txt\. Did you mean 'txt'"),
        ("a.csv", b"id;text\n1;x\n", "has no column 'text', it has id;text"),
        ("a.csv", b"id,text\n1,x\n2,y, and z\n", "row 1: there are 3 fields, the header has 2"),
        ("a.csv", b'id,text\n1,"x\n', "the table cannot be parsed: unexpected end of data"),
        ("a.csv", "id,text\n1,été\n".encode("latin1"), "byte 0xe9 at byte offset 10 .*iconv -f LATIN1"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(tmp_path, name, raw)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.json.gz"])
def test_a_table_given_by_name_is_read(name: str, tmp_path: Path) -> None:
    texts = [f"Text {number} of a table." for number in range(40)]
    records = [{"id": index, "text": text} for index, text in enumerate(texts)]
    raw = json.dumps(records) if ".json" in name else "text\n" + "\n".join(texts)
    raw = "\n".join(map(json.dumps, records)) if name.endswith("l") else raw
    (tmp_path / name).write_bytes(gzip.compress(raw.encode()) if name.endswith(".gz") else raw.encode())
    corpus = open_corpus(tmp_path / name)
    assert sorted(document.read() for split in corpus.splits for document in corpus.get_split(split)) == sorted(texts)
    module = BookDataModule(str(tmp_path / name), cache_dir=str(tmp_path / "cache"), num_workers=1)
    module.prepare_data()
    for split in corpus.splits:
        store = module.token_store(split)
        decoded = [bytes(store.document_tokens(index)[1:].astype("u1")).decode() for index in range(len(store))]
        assert decoded == [document.read() for document in corpus.get_split(split)]


def zstd() -> Any:
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return pytest.importorskip(module, reason="backports.zstd is not installed")


def test_zst_is_read_in_all_its_frames(tmp_path: Path) -> None:
    compress, parameter = zstd().compress, zstd().CompressionParameter
    text = "".join(f"Paragraph {number} of a book.\n\n" for number in range(500)).encode()
    frames = compress(text[:999]) + compress(text[999:], options={parameter.window_log: 28})
    (tmp_path / "book.txt.zst").write_bytes(frames)
    corpus = open_corpus(tmp_path)
    assert "".join(corpus.get_split(split)[0].read() for split in corpus.splits).encode() == text
    (tmp_path / "book.txt.zst").write_bytes(frames[:-9])
    with pytest.raises(DataError, match="could not be read: EOFError"):
        open_corpus(tmp_path)
    frames = compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n')
    assert [document.text for document in table(tmp_path, "a.jsonl.zst", frames)] == ["one", "two"]


def test_zst_without_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt.zst").write_bytes(b"(\xb5/\xfd")
    for name in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MemtxError, match=r"Reading \.zst needs .*pip install 'memtx\[data\]'"):
        open_corpus(tmp_path)
