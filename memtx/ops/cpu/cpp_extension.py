"""C++ sources of the package, compiled once per machine for its processor, and loaded.

Sources receive addresses and include no torch headers, so compiling takes seconds and does not depend on the build of
torch. Libraries are cached in ``~/.cache/memtx`` under a hash of source, headers, flags and processor, and shared
by all processes. Callers fall back to another implementation if no compiler is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memtx import files
from memtx.errors import MemtxError
from memtx.ops.cpu import cpu_info

log = logging.getLogger(__name__)

COMPILER_FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
COMPILE_ENV_VAR = "MEMTX_COMPILE"
"""Environment variable; the value 0 disables compiling."""

CPU_INFO_FIELDS = ("model name", "flags", "Features", "CPU part")
"""Fields that identify a processor, on x86 and on ARM."""


def find_compiler() -> str | None:
    """Return the path of the C++ compiler: ``CXX`` if set, else the first installed. None if there is none."""
    requested = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [requested] if requested else ["c++", "g++", "clang++"])), None)


@contextlib.contextmanager
def _open_build_dir() -> Iterator[Path]:
    """Yield the folder of compiled libraries; if it is not writable, a temporary one that is removed after loading."""
    cache_dir = files.default_cache_dir() / "compiled"
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.access(cache_dir, os.W_OK):
        yield cache_dir
    else:
        with tempfile.TemporaryDirectory(prefix="memtx-") as folder:
            yield Path(folder)


@cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Load the ``extern "C"`` functions of a source, compiled if needed; on failure log the reason and return None."""
    if os.environ.get(COMPILE_ENV_VAR) == "0":
        log.info("%s is not compiled: %s is 0", source.name, COMPILE_ENV_VAR)
        return None
    cpu = [cpu_info.read_cpu_info().get(name, "") for name in CPU_INFO_FIELDS]
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, *COMPILER_FLAGS, platform.machine(), *cpu])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    try:
        with _open_build_dir() as folder:
            if not (folder / name).exists():
                _compile(source, folder / name)
            return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.SubprocessError, MemtxError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        log.info("%s is not compiled: %s", source.name, reason.splitlines()[0] if reason else error)
        return None


def is_available(source: Path) -> bool:
    """Return True if a source can be loaded; False while a program is exported, which holds operators of torch only."""
    return not torch.compiler.is_exporting() and load_library(source) is not None


def call(source: Path, name: str, *arguments: Any) -> None:
    """Call a function of a source that :func:`load_library` loads, which callers make sure of.

    Tensors and None are passed as addresses, integers as int64, other numbers as float32, and sequences of one of these
    as arrays.
    """
    library = load_library(source)
    assert library is not None, f"{source.name} is not compiled"
    getattr(library, name)(*map(_to_ctypes, arguments))


def _to_ctypes(value: Any) -> Any:
    if isinstance(value, Sequence):
        elements = [_to_ctypes(element) for element in value]
        return (type(elements[0]) * len(elements))(*elements)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


def _compile(source: Path, library_path: Path) -> None:
    """Compile one file; raise OSError without a compiler or disk space, SubprocessError if the compiler fails."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler was found; install g++ or clang++, or set CXX")
    log.info("compiling %s with %s, once on this machine", source.name, compiler)
    with files.atomic_path(library_path) as path:
        command = [compiler, *COMPILER_FLAGS, "-o", str(path), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
