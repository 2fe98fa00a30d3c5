"""The house rules that a program can check: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx

HOME = Path(memtx.__file__).parent

# A file imports from lower rows only; the longest name that fits decides a file's row.
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
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
# Data knows text and files, no model; only code that trains, reads or measures text imports it.
DATA_MAY = {"data", "errors", "files", "class_config", "metrics", "plots"}
MAY_DATA = {"data", "training", "inference", "evaluation", "serving", "cli", "checkpoint.load", "checkpoint.convert"}
FORBIDDEN = {("serving", "training"), ("training", "inference")}
PENDING = {("models", "hf"), ("checkpoint.convert", "inference")}
# The lightning package costs seconds: only these import it.
LIGHTNING = (
    "training",
    "checkpoint/training.py",
    "checkpoint/async_io.py",
    "data/books.py",
    "data/tasks/example_files.py",
    "data/synthetic_tasks/data_module.py",
    "cli/fit.py",
    "cli/lightning_cli.py",
)
LONGEST = 400


def sources() -> list[Path]:
    return sorted(HOME.rglob("*.py"))


def row_name(dotted: str) -> str:
    """The longest prefix of a module's name, without the package's own, that has a row."""
    parts = dotted.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in HEIGHT), parts[0])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Every absolute module name that the file imports, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(own: str, other: str) -> bool:
    siblings = HEIGHT[own] == HEIGHT[other] and own.partition(".")[0] == other.partition(".")[0]
    if siblings or own == "__main__":
        return True
    if own == "data":
        return other in DATA_MAY
    if other == "data":
        return own in MAY_DATA
    if (own, other) in PENDING:
        return True
    return HEIGHT[other] < HEIGHT[own] and (own, other) not in FORBIDDEN


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(HOME)))
def test_imports_point_downward(path: Path) -> None:
    own = row_name(module_name(path))
    if own == "__init__":
        return
    assert own in HEIGHT, f"{own} has no row in the table"
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == "memtx" and rest and rest != "__version__":
            other = row_name(rest)
            # A public class by its short name would hide which row it lives in.
            assert other in HEIGHT, f"{path}: import {name} from the file that defines it"
            assert allowed(own, other), f"{path}: {own} may not import {rest}"
        if root in ("lightning", "pytorch_lightning"):
            assert str(path.relative_to(HOME)).startswith(LIGHTNING), f"{path}: lightning is not for here"


def test_the_table_itself() -> None:
    assert allowed("memory", "ops")
    assert not allowed("ops", "memory")
    assert not allowed("models", "data")
    assert not allowed("data", "ops")
    assert not allowed("training", "inference")
    assert not allowed("state", "segment")


def test_files_are_one_subject_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    too_long = {str(path): count for path, count in lines.items() if count > LONGEST}
    assert not too_long, "a file past 400 lines is two subjects"
    real = sorted(count for path, count in lines.items() if path.name != "__init__.py")
    assert real[len(real) // 2] < 200


def test_no_drawer_for_everything() -> None:
    for path in sources():
        relative = path.relative_to(HOME)
        for part in (*relative.parts[:-1], relative.stem):
            assert part not in {"utils", "util", "helpers", "misc"}, relative
            assert part != "common", relative


def test_the_library_does_not_print() -> None:
    for path in sources():
        if row_name(module_name(path)) != "cli":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
