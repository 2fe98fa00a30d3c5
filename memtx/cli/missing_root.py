"""The error for a config that names no texts or examples."""

from __future__ import annotations

from typing import Any

from memtx.cli.one_line_parser import OneLineParser
from memtx.cli.options import command_line
from memtx.data.sources.corpus import PG19_HINT
from memtx.data.tasks.data_module import ExampleDataModule
from memtx.data.tasks.examples import LAYOUT_HINT
from memtx.errors import DataError


def missing_root_error(data_class: Any, *, is_fit: bool) -> DataError:
    """Return the error that says what ``data.root`` of a data module is to hold, and where to get it."""
    has_examples = isinstance(data_class, type) and issubclass(data_class, ExampleDataModule)
    content, hint = ("examples", LAYOUT_HINT) if has_examples else ("texts", PG19_HINT)
    content, hint = getattr(data_class, "content_and_hint", (content, hint))
    # The comments at the top of a shipped config say where to get its data.
    paths = ", ".join(f"'{path}'" for path in OneLineParser.configs)
    source = f"; see the first lines of {paths}" if paths else ""
    if not paths and is_fit:
        hint = (
            f"Train with: {command_line('fit', '--data.root', 'FOLDER')}, or --data.root embedded for Python's "
            f"help texts, or --config FILE. {command_line('fit', '--help')} explains all options."
        )
    return DataError(f"data.root is not set, expected the folder of {content}{source}.", hint)
