"""C++ sources compiled on the machine: once, kept whole, and done without where that cannot be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from memtx.ops.cpu import cpp_extension

SOURCE = 'extern "C" int answer() { return 42; }\n'

# Every test asks anew, as a process does.
library = cpp_extension.load_library.__wrapped__


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file to compile, in a home where nothing has been compiled yet."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def kept(source: Path) -> list[Path]:
    return list((source.parent / "home/.cache/memtx/compiled").iterdir())


needs_compiler = pytest.mark.skipif(cpp_extension.find_compiler() is None, reason="no C++ compiler on this machine")


@needs_compiler
def test_what_is_compiled_is_kept_and_found_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library(source)
    assert first is not None
    assert first.answer() == 42
    (path,) = kept(source)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    again = library(source)
    assert again is not None
    assert again.answer() == 42
    assert kept(source) == [path]


@needs_compiler
def test_another_source_is_another_library(source: Path) -> None:
    assert library(source) is not None
    source.write_text(SOURCE.replace("42", "43"))
    other = library(source)
    assert other is not None
    assert other.answer() == 43


@needs_compiler
def test_a_home_that_cannot_be_written_to_is_done_without(source: Path) -> None:
    (source.parent / "home").write_text("a file where a folder would be")
    found = library(source)
    assert found is not None
    assert found.answer() == 42


@needs_compiler
def test_a_source_that_does_not_compile_is_said_and_leaves_nothing(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("this is no C++\n")
    with caplog.at_level(logging.INFO, "memtx"):
        assert library(source) is None
    assert "answer.cpp is not compiled:" in caplog.text
    assert "answer.cpp:1:1: error" in caplog.text
    assert kept(source) == []


def test_no_compiler_is_said(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with caplog.at_level(logging.INFO, "memtx"):
        assert library(source) is None
    assert "no C++ compiler was found; install g++ or clang++, or set CXX" in caplog.text


def test_it_can_be_switched_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpp_extension.COMPILE_ENV_VAR, "0")
    assert library(source) is None
    assert not (source.parent / "home").exists()
