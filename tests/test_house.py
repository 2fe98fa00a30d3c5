"""The house rules that a program can check: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx

HOME = Path(memtx.__file__).parent

# A folder or file imports from lower rows only; neighbours in a row only where named below.
ROWS = [
    ("errors", "allocator"),
    ("files", "once"),
    ("specs", "metrics", "plots", "sealed"),
    ("state", "segment"),
    ("ops", "data"),
    ("memory",),
    ("layers",),
    ("models",),
    ("training", "inference"),
    ("serving", "evaluation"),
    ("cli", "__main__"),
]
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
# data knows text and files, no model; only what trains, reads or measures text knows data.
DATA_MAY = {"data", "errors", "files", "specs", "metrics", "plots"}
MAY_DATA = {"data", "training", "inference", "evaluation", "serving", "cli"}
FORBIDDEN = {("serving", "training"), ("training", "inference")}
# The lightning package costs seconds: only these import it.
LIGHTNING = ("training", "data/books.py", "data/example_files.py", "data/drawn.py", "cli/fit.py")
LONGEST = 400


def sources() -> list[Path]:
    return sorted(HOME.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(HOME).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every absolute module name that the file imports, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(own: str, other: str) -> bool:
    if own == other or own == "__main__":
        return True
    if own == "data":
        return other in DATA_MAY
    if other == "data":
        return own in MAY_DATA
    return HEIGHT[other] < HEIGHT[own] and (own, other) not in FORBIDDEN


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(HOME)))
def test_imports_point_downward(path: Path) -> None:
    own = place(path)
    if own == "__init__":
        return
    assert own in HEIGHT, f"{own} has no row in the table"
    for name in imported(path):
        root, *rest = name.split(".")
        if root == "memtx" and rest:
            if rest[0] == "__version__":
                continue
            # A public class by its short name would hide which floor it lives on.
            assert rest[0] in HEIGHT, f"{path}: import {name} from the file that defines it"
            assert allowed(own, rest[0]), f"{path}: {own} may not import {rest[0]}"
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
            assert part != "common" or str(relative) == "cli/common.py", relative


def test_the_library_does_not_print() -> None:
    for path in sources():
        if place(path) != "cli":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
