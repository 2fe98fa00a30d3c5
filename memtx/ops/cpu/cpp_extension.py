"""C++ sources of the package, compiled once a machine for the processor it has, and loaded.

A source needs no header of torch: it is given addresses, so that compiling takes seconds and nothing depends on how
torch was built. What is compiled is kept in ``~/.cache/memtx`` under a name made of the source, the flags and the
processor, and is shared by all processes. Where there is no compiler, whoever asks has another way.
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
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from memtx import files
from memtx.errors import MemtxError
from memtx.ops.cpu import cpu_info

log = logging.getLogger(__name__)

COMPILER_FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
COMPILE_ENV_VAR = "MEMTX_COMPILE"
"""Environment variable: 0 for never compiling anything."""

CPU_INFO_FIELDS = ("model name", "flags", "Features", "CPU part")
"""What tells processors apart, on x86 and on ARM."""


def find_compiler() -> str | None:
    """Return the C++ compiler's path: ``CXX``, or the first that there is; None if there is none."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None)


def _describe_cpu() -> str:
    """Return what tells processors apart for which compiled code differs."""
    told = cpu_info.read_cpu_info()
    return "\n".join([platform.machine(), *(told.get(name, "") for name in CPU_INFO_FIELDS)])


@contextlib.contextmanager
def _open_build_dir() -> Iterator[Path]:
    """Yield where what is compiled is kept; where nothing can be, a folder that goes once the file is loaded."""
    kept = files.default_cache_dir() / "compiled"
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.access(kept, os.W_OK):
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="memtx-") as passing:
            yield Path(passing)


@cache
def load_library(source: Path) -> ctypes.CDLL | None:
    """Return a source's functions, compiled where they are not yet; None where that cannot be, and why is logged.

    Args:
        source: a C++ file with ``extern "C"`` functions.
    """
    if os.environ.get(COMPILE_ENV_VAR) == "0":
        log.info("%s is not compiled: %s is 0", source.name, COMPILE_ENV_VAR)
        return None
    asked = "\n".join([source.read_text(encoding="utf-8"), *COMPILER_FLAGS, _describe_cpu()])
    name = f"{source.stem}-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.so"
    try:
        with _open_build_dir() as folder:
            if not (folder / name).exists():
                _compile(source, folder / name)
            return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.SubprocessError, MemtxError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.info("%s is not compiled: %s", source.name, said.strip().splitlines()[0] if said.strip() else error)
        return None


def _compile(source: Path, library_path: Path) -> None:
    """Compile one file.

    Raises:
        OSError: there is no compiler, or no room.
        subprocess.SubprocessError: the compiler failed.
    """
    program = find_compiler()
    if program is None:
        raise OSError("no C++ compiler was found; install g++ or clang++, or set CXX")
    log.info("compiling %s with %s, once on this machine", source.name, program)
    with files.atomic_path(library_path) as path:
        command = [program, *COMPILER_FLAGS, "-o", str(path), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
