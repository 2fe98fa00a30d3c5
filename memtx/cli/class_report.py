"""Scores of each class after ``memtx validate`` and ``memtx test``: a table, classes.json and a confusion matrix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from memtx import files
from memtx.cli.options import print_table
from memtx.errors import MemtxError
from memtx.task_plots import plot_confusion

MAX_PRINTED_CLASSES = 50


def write_class_report(report: dict[str, Any] | None, folder: Path) -> None:
    """Print the scores of each class, and write them and the confusion matrix to a folder; nothing without a report."""
    if report is None:
        return
    scores = sorted(report["classes"].items(), key=lambda entry: -entry[1]["support"])
    columns = ("precision", "recall", "f1")
    lines = [
        [label, *(f"{values[name]:.3f}" for name in columns), f"{values['support']:,}"] for label, values in scores
    ]
    print_table(("class", *columns, "examples"), lines[:MAX_PRINTED_CLASSES])
    files.write_json(folder / "classes.json", report)
    names = "classes.json"
    if (confusion := report.get("confusion")) is not None:
        try:
            plot_confusion(folder / "confusion.png", confusion["labels"], confusion["matrix"])
            names += " and confusion.png"
        except MemtxError as error:  # The scores are written.
            sys.stderr.write(f"memtx: {error}\n")
    sys.stdout.write(f"Scores of all {len(scores)} classes are in '{folder}': {names}.\n")
