"""Summary of a model's parameters at the start of a run."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table

FLOPS_COLUMN = "FLOPs"


class ParameterSummary(ModelSummary):
    """Writes the parts of the model with their parameters to stderr, without Lightning's count of 0 operations."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], *totals: Any, total_flops: int = 0, **options: Any
    ) -> None:
        """Write the table, without a column of operations if none are known."""
        columns = [column for column in summary_data if total_flops or column[0] != FLOPS_COLUMN]
        format_table: Any = _format_summary_table
        lines: list[str] = format_table(*totals, total_flops, *columns).splitlines()
        lines = [line for line in lines if total_flops or "flops" not in line.lower()]
        sys.stderr.write("\n".join([*lines, ""]))
