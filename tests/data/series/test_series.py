"""Series in files: columns by name, splits, standardization by the training parts, and errors with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memtx.data.series.data_module import SeriesDataModule
from memtx.data.series.files import open_columns
from memtx.data.series.schema import SeriesSchema
from memtx.errors import CheckpointError, DataError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, values: np.ndarray, names: str = "a,b,c") -> Path:
    return write(path, "\n".join([names, *(",".join(map(str, line)) for line in values.tolist()), ""]))


def open_data(root: Path, tmp_path: Path, **options: Any) -> SeriesDataModule:
    settings = {"batch_size": 2, "segment_length": 4, "bptt_segments": 2, "cache_dir": str(tmp_path / "cache")}
    return SeriesDataModule(str(root), **(settings | options))


def test_csv_and_arrays_are_mapped_and_equal(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((50, 3))
    write_csv(tmp_path / "s.csv", values)
    write_csv(tmp_path / "s.tsv", values)
    (tmp_path / "s.tsv").write_text((tmp_path / "s.csv").read_text().replace(",", "\t"))
    np.save(tmp_path / "s.npy", values)
    np.save(tmp_path / "f.npy", np.rec.fromarrays(values.T, names="a,b,c"))
    for name, columns in (("s.csv", "cb"), ("s.tsv", "cb"), ("s.npy", "21"), ("f.npy", "cb")):
        array = open_columns(tmp_path / name, tuple(columns), tmp_path / "cache")
        assert np.array_equal(array, values[:, [2, 1]])
    for name, columns in (("s.csv", "bc"), ("s.npy", "12")):
        mapped = open_columns(tmp_path / name, tuple(columns), tmp_path / "cache")
        while not isinstance(mapped, np.memmap):
            mapped = mapped.base
        assert isinstance(mapped, np.memmap)
    # A changed file is converted again.
    write_csv(tmp_path / "s.csv", values + 1000)
    assert np.array_equal(open_columns(tmp_path / "s.csv", ("a",), tmp_path / "cache")[:, 0], values[:, 0] + 1000)


MISTAKES = {
    "a,b\n1,2\n3\n": "line 3 has 1 fields, the header 2",
    "a,b\n1,2\n3,4,5\n": "line 3 has 3 fields, the header 2",
    "a,b\n1,2\n3,\n": "line 3, column 'b': the value is missing. Fill the gap",
    "a,b\n1,2\nNaN,4\n": r"line 3, column 'a': the value is missing \(NaN\)",
    "a,b\n1,2\ninf,4\n": "line 3, column 'a': inf is not finite",
    "date,b\n2020-01-01,2\n": r"line 2, column 'date': '2020-01-01' is not a number. Name the columns .* \[b\]",
    "a,b\n1_000,2\n": "'1_000' is not a number",
    "a,b\n1,2\n\n3,4\n": "line 3 is blank",
    'a,b\n1,2\n"3,4\n': "line 3: unexpected end of data",
    "1,2\n3,4\n": "begins with numbers, expected the names",
    "a,a\n1,2\n": "two columns named 'a'",
    "a;b\n1;2\n": "'1;2' is not a number",
    "": "is empty",
    "a,b\n": "a header and no values",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_has_its_place(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", text)
    with pytest.raises(DataError, match=MISTAKES[text]):
        open_data(path, tmp_path).train_dataloader()
    assert not list((tmp_path / "cache").glob("*"))  # nothing half-written


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_no_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", "\ufeffa, b \r\n1,2\r\n3,4\r\n\r\n\r\n")
    assert open_columns(path, ("a", "b"), tmp_path / "cache").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, 2.0], [3.0, np.nan]]), r"step 1, column '1': the value is nan"),
        (np.array([["a", "b"]]), "expected numbers"),
        (np.zeros((2, 2, 2)), r"is float64 \(2, 2, 2\), expected numbers \(steps, columns\)"),
        (np.zeros((0, 2)), "expected numbers"),
        (np.array([[1.0], [1.0, 2.0]], dtype=object), "is not an array of numbers"),
    ],
)
def test_a_mistake_in_an_array_is_named(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", array)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / "s.npy", tmp_path, validation_fraction=0.0, test_fraction=0.0).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["a", "temp"]}, "has no column 'temp'. It has a, b, c"),
        ({"columns": ["a", "a"]}, "Name each column once in data.columns"),
        ({"columns": []}, "Name each column once"),
        ({"targets": ["d"]}, "has no column 'd'"),
        ({"steps_ahead": 0}, "steps_ahead is 0, but the target 'a' is read, too"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "less than 1 together"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "s.csv", np.ones((20, 3)))
    with pytest.raises(DataError, match=message):
        open_data(path, tmp_path, **options)


def test_no_series(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_data(tmp_path / "none", tmp_path)
    write(tmp_path / "folder" / "notes.txt", "a")
    with pytest.raises(DataError, match=r"holds no series, expected files ending in .csv, .tsv, .npy"):
        open_data(tmp_path / "folder", tmp_path)


def test_another_column_in_one_of_the_files(tmp_path: Path) -> None:
    write_csv(tmp_path / "x" / "1.csv", np.ones((30, 3)))
    write_csv(tmp_path / "x" / "2.csv", np.ones((30, 3)), names="a,b,d")
    with pytest.raises(DataError, match=r"2.csv' has no column 'c'"):
        open_data(tmp_path / "x", tmp_path).train_dataloader()


def test_training_batches_hold_every_step_and_the_values_ahead(tmp_path: Path) -> None:
    """Standardization is that of the training part alone; labels do not cross a series."""
    series = [np.arange(40.0)[:, None] + [0, 100, 5000] + 1000 * index for index in range(2)]
    for index, values in enumerate(series):
        write_csv(tmp_path / "x" / f"{index}.csv", values)
    data = open_data(tmp_path / "x", tmp_path, columns=["c", "a"], targets=["b"], steps_ahead=3)
    assert (data.input_dim, data.output_dim) == (2, 1)
    streams = data.train_dataloader()
    train = np.concatenate([values[:32] for values in series])
    schema = data.schema
    assert schema.mean == pytest.approx(dict(zip("abc", train.mean(0), strict=True)), rel=1e-12)
    assert schema.std == pytest.approx(dict(zip("abc", train.std(0), strict=True)), rel=1e-12)
    batches = [streams.get_batch(step) for step in range(4)]
    inputs, labels, document_starts = (torch.cat(parts, dim=1) for parts in zip(*batches, strict=True))
    assert document_starts[:, 0].all()
    assert document_starts.sum() == 2
    a = (inputs[..., 1].double() * schema.std["a"] + schema.mean["a"]).round()
    b = (labels[..., 0].double() * schema.std["b"] + schema.mean["b"]).round()
    assert sorted(a.flatten().tolist()) == sorted(train[:, 0].tolist())
    assert torch.equal(b[:, :29], a[:, :29] + 103)
    assert b[:, 29:].isnan().all()  # the value is in the validation part


def test_evaluation_reads_every_step_once_and_padding_is_not_scored(tmp_path: Path) -> None:
    lengths = {"train/x": 30, "test/y": 13, "test/z": 7}
    for name, length in lengths.items():
        write_csv(tmp_path / "x" / f"{name}.csv", np.random.default_rng(length).standard_normal((length, 3)))
    data = open_data(tmp_path / "x", tmp_path, eval_batch_size=3)
    assert data.has_split("test")
    assert not data.has_split("validation")
    assert data.val_dataloader() == []
    batches = list(data.test_dataloader())
    labels = torch.cat([batch.labels for batch in batches], dim=1)
    assert int((~labels.isnan()).all(-1).sum()) == 13 + 7 - 2
    assert labels.dtype == torch.float32


def test_large_offsets_and_constant_columns(tmp_path: Path) -> None:
    values = np.stack([1e9 + np.arange(50) / 7, np.full(50, 0.1), np.random.default_rng(0).standard_normal(50)], axis=1)
    np.save(tmp_path / "s.npy", values)
    data = open_data(tmp_path / "s.npy", tmp_path, validation_fraction=0.0, test_fraction=0.0, batch_size=1)
    streams = data.train_dataloader()
    inputs = torch.cat([streams.get_batch(step).inputs for step in range(6)], dim=1)[0].double().numpy()
    assert data.schema.std["1"] == 1.0
    assert np.allclose(inputs[:, 1], 0.0, atol=1e-12)
    assert np.allclose(inputs[:, 0] * data.schema.std["0"] + data.schema.mean["0"], values[:48, 0], rtol=0, atol=1e-5)


def test_a_long_series_is_cut_for_all_streams(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.arange(1000.0))
    data = open_data(tmp_path / "s.npy", tmp_path, batch_size=4)
    assert data.train_dataloader().store.lengths.tolist() == [200] * 4
    data = open_data(tmp_path / "s.npy", tmp_path, max_length=150)
    lengths = data.train_dataloader().store.lengths
    assert lengths.max() <= 150
    assert lengths.sum() == 800


def test_position_and_schema_are_restored(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "s.csv", np.random.default_rng(0).standard_normal((200, 3)))
    data = open_data(path, tmp_path)
    streams = data.train_dataloader()
    batches = iter(streams)
    for _ in range(3):
        next(batches)
    saved, expected = data.state_dict(), next(batches)
    again = open_data(path, tmp_path)
    again.load_state_dict(saved)
    resumed = next(iter(again.train_dataloader()))
    assert all(torch.equal(x, y) for x, y in zip(resumed, expected, strict=True) if not x.is_floating_point())
    assert torch.equal(resumed.inputs, expected.inputs)
    other = open_data(path, tmp_path, targets=["a"])
    with pytest.raises(CheckpointError, match=r"trained with targets \('a', 'b', 'c'\), this run has \('a',\)"):
        other.load_state_dict(saved)
    changed = write_csv(tmp_path / "t.csv", np.random.default_rng(1).standard_normal((200, 3)))
    elsewhere = open_data(changed, tmp_path)
    elsewhere.load_state_dict(saved)
    assert elsewhere.schema == data.schema  # not the statistics of these series
    with pytest.raises(CheckpointError, match="belongs to corpus"):
        elsewhere.train_dataloader()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"columns": ["a"], "targets": ["a"], "steps_ahead": 1, "mean": {}, "std": {}}']
)
def test_a_damaged_schema_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="are damaged"):
        SeriesSchema.from_json(text)
