"""Rules of layout: imports point downward, files are short, and only the command line prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx

PACKAGE = Path(memtx.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A file imports from lower rows only; the longest prefix of its name determines its row.
ROWS = [
    ("errors",),
    ("files", "memo", "training.callbacks.trainer_state"),
    ("class_config", "metrics", "plots"),
    ("state", "segment"),
    ("ops", "data"),
    ("memory",),
    ("layers", "checkpoint"),
    ("models",),
    ("hf",),
    ("checkpoint.load", "checkpoint.convert"),
    ("training", "inference", "checkpoint.training", "checkpoint.async_io"),
    ("serving", "evaluation"),
    ("cli", "__main__"),
]
HEIGHTS = {name: height for height, row in enumerate(ROWS) for name in row}
# Data imports no model code; only code that trains on text, reads it or measures with it imports data.
IMPORTABLE_BY_DATA = {"data", "errors", "files", "class_config", "metrics", "plots"}
IMPORTERS_OF_DATA = {
    "data",
    "training",
    "inference",
    "evaluation",
    "serving",
    "cli",
    "checkpoint.load",
    "checkpoint.convert",
}
FORBIDDEN = {("serving", "training"), ("training", "inference")}
# Importing Lightning takes seconds, so only these files do.
LIGHTNING_IMPORTERS = (
    "training",
    "checkpoint/training.py",
    "checkpoint/async_io.py",
    "data/books.py",
    "data/tasks/data_module.py",
    "data/synthetic_tasks/data_module.py",
    "cli/fit.py",
    "cli/lightning_cli.py",
)
MAX_LINES = 400
MAX_MEDIAN_LINES = 200
MAX_FILES = 215
MAX_TOTAL_LINES = 30_000


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def row_name(module: str) -> str:
    """Return the longest prefix of a module's name, without the package's, that has a row."""
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in HEIGHTS), parts[0])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> Iterator[str]:
    """Yield the absolute name of each import in a file, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def may_import(importer: str, imported: str) -> bool:
    """Return whether files of one row name may import those of another."""
    same_package = importer.partition(".")[0] == imported.partition(".")[0]
    if importer == "__main__" or (same_package and HEIGHTS[importer] == HEIGHTS[imported]):
        return True
    if importer == "data":
        return imported in IMPORTABLE_BY_DATA
    if imported == "data":
        return importer in IMPORTERS_OF_DATA
    return HEIGHTS[imported] < HEIGHTS[importer] and (importer, imported) not in FORBIDDEN


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downward(path: Path) -> None:
    importer = row_name(module_name(path))
    if importer == "__init__":
        return
    assert importer in HEIGHTS, f"{importer} has no row in ROWS"
    for name in imported_names(path):
        package, _, module = name.partition(".")
        if package == "memtx" and module and module != "__version__":
            imported = row_name(module)
            # A public class imported by its short name would hide its row.
            assert imported in HEIGHTS, f"{path}: import {name} from the file that defines it"
            assert may_import(importer, imported), f"{path}: {importer} may not import {module}"
        if package in ("lightning", "pytorch_lightning"):
            assert relative(path).startswith(LIGHTNING_IMPORTERS), f"{path} may not import Lightning"


def test_rows_forbid_upward_imports() -> None:
    assert may_import("memory", "ops")
    assert not may_import("ops", "memory")
    assert not may_import("models", "data")
    assert not may_import("models", "hf")
    assert not may_import("data", "ops")
    assert not may_import("training", "inference")
    assert not may_import("state", "segment")


def test_files_are_short_and_few() -> None:
    num_lines = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    too_long = {name: count for name, count in num_lines.items() if count > MAX_LINES}
    assert not too_long, f"a file of more than {MAX_LINES} lines has two subjects"
    counts = sorted(count for name, count in num_lines.items() if not name.endswith("__init__.py"))
    assert counts[len(counts) // 2] < MAX_MEDIAN_LINES
    assert len(SOURCES) <= MAX_FILES
    assert sum(num_lines.values()) <= MAX_TOTAL_LINES


def test_no_module_has_a_catch_all_name() -> None:
    for path in SOURCES:
        names = (*path.relative_to(PACKAGE).parts[:-1], path.stem)
        assert not {"utils", "util", "helpers", "misc", "common"}.intersection(names), path


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if row_name(module_name(path)) != "cli":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
