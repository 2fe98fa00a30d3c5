"""metrics.csv is complete after any end of a run and continues with it."""

from __future__ import annotations

import csv
from pathlib import Path

from memtx.training.csv_logger import ResumableCSVLogger


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, steps: range, go_on: bool = False, **more: float) -> None:
    logger = ResumableCSVLogger(folder, go_on)
    for step in steps:
        logger.log_metrics({"loss": step / 2, **more}, step)
        logger.save()


def test_a_truncated_row_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, range(4))
    content = (tmp_path / "metrics.csv").read_bytes()
    # As a kill leaves the row of a step: of 12, just "1" may be there.
    (tmp_path / "metrics.csv").write_bytes(content + b"0.5")
    log(tmp_path, range(4, 6), go_on=True)
    assert [int(row["step"]) for row in read_rows(tmp_path)] == list(range(6))
    assert (tmp_path / "metrics.csv").read_bytes().startswith(content)


def test_a_new_column_keeps_the_rows(tmp_path: Path) -> None:
    log(tmp_path, range(3))
    log(tmp_path, range(2, 5), go_on=True, accuracy=0.5)
    lines = read_rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in lines] == [(str(step), str(step / 2)) for step in range(5)]
    assert [row["accuracy"] for row in lines] == ["", "", "0.5", "0.5", "0.5"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
