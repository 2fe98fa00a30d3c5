"""Freed memory is kept for the next allocation."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="the C library is not glibc",
)

COUNT_FAULTS = """
import resource
from memtx.ops.cpu.malloc import release_freed_memory, retain_freed_memory

size = 30 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(retain_freed_memory(), faults(), faults(), release_freed_memory(), faults(), faults())
"""


def run_faults(**environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, env={**inherited, **environment}
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@needs_glibc
def test_retained_pages_are_not_cleared_again() -> None:
    retained, _, second_faults, released, *faults_after_release = run_faults()
    assert (retained, released) == ("True", "True")
    # 30 MiB are at least 15 pages (of 2 MiB), at most 7,680; a few faults may have other causes.
    assert int(second_faults) < 8
    assert all(int(faults) >= 15 for faults in faults_after_release)


@needs_glibc
def test_environment_variables_take_precedence() -> None:
    retained, *_ = run_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert retained == "False"
