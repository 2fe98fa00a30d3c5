"""C++ sources are compiled once per machine and cached atomically; failures are logged and return None."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from memtx.ops.cpu import cpp_extension

SOURCE = 'extern "C" int answer() { return 42; }\n'

# Without the cache, as in a new process.
load_library = cpp_extension.load_library.__wrapped__


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file to compile, with a home folder in which nothing has been compiled."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def list_libraries(source: Path) -> list[Path]:
    return list((source.parent / "home/.cache/memtx/compiled").iterdir())


needs_compiler = pytest.mark.skipif(cpp_extension.find_compiler() is None, reason="no C++ compiler on this machine")


@needs_compiler
def test_library_is_cached_and_loads_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_library(source)
    assert first is not None
    assert first.answer() == 42
    (path,) = list_libraries(source)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    second = load_library(source)
    assert second is not None
    assert second.answer() == 42
    assert list_libraries(source) == [path]


@needs_compiler
def test_changed_source_is_compiled_again(source: Path) -> None:
    assert load_library(source) is not None
    source.write_text(SOURCE.replace("42", "43"))
    second = load_library(source)
    assert second is not None
    assert second.answer() == 43


@needs_compiler
def test_library_loads_with_an_unwritable_home(source: Path) -> None:
    (source.parent / "home").write_text("a file where a folder would be")
    library = load_library(source)
    assert library is not None
    assert library.answer() == 42


@needs_compiler
def test_compile_error_is_logged_and_leaves_no_file(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("this is no C++\n")
    with caplog.at_level(logging.INFO, "memtx"):
        assert load_library(source) is None
    assert "answer.cpp is not compiled:" in caplog.text
    assert "answer.cpp:1:1: error" in caplog.text
    assert list_libraries(source) == []


def test_missing_compiler_is_logged(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with caplog.at_level(logging.INFO, "memtx"):
        assert load_library(source) is None
    assert "no C++ compiler was found; install g++ or clang++, or set CXX" in caplog.text


def test_environment_variable_disables_compiling(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpp_extension.COMPILE_ENV_VAR, "0")
    assert load_library(source) is None
    assert not (source.parent / "home").exists()
