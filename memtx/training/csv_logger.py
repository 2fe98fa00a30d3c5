"""Logger of metrics.csv that keeps earlier rows when a run resumes."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from memtx import files


class _ResumableWriter(ExperimentWriter):
    """Appends to an existing file, which Lightning's writer deletes."""

    def __init__(self, log_dir: str, resume: bool) -> None:
        super().__init__(log_dir)
        self._needs_truncation = self._fs.isfile(self.metrics_file_path)
        if self._needs_truncation and not resume:
            self._fs.rm_file(self.metrics_file_path)
            self._needs_truncation = False

    def _check_log_dir_exists(self) -> None:
        return

    def log_hparams(self, params: dict[str, Any]) -> None:
        return  # config.yaml has them all.

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if self._needs_truncation and step is not None:
            # A killed run logged steps after its last checkpoint, which are repeated.
            self._needs_truncation = False
            lines, self.metrics_keys = self._read_rows()
            self._write_rows([row for row in lines if (row.get("step") or "").isdecimal() and int(row["step"]) < step])
        super().log_metrics(metrics_dict, step)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write_rows(self._read_rows()[0])

    def _read_rows(self) -> tuple[list[dict[str, str]], list[str]]:
        """Return the complete rows and their columns; a kill can truncate the last row."""
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            reader = csv.DictReader(file)
            lines = [row for row in reader if None not in row.values()]
            return lines, sorted(reader.fieldnames or ())

    def _write_rows(self, lines: list[dict[str, str]]) -> None:
        """Replace the file atomically."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
        files.write_text(self.metrics_file_path, text.getvalue())


class ResumableCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` to the run folder.

    Args:
        save_dir: Run folder.
        resume: If True, keep existing rows of steps before the first one that is logged.
    """

    def __init__(self, save_dir: str | os.PathLike[str], resume: bool = False) -> None:
        super().__init__(str(save_dir), name="", version="")
        self._resume = resume

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, created on first use."""
        if self._experiment is None:
            self._experiment = _ResumableWriter(self.log_dir, self._resume)
        return self._experiment
