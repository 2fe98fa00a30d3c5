"""Memory that is given back is kept for the next who asks."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="the C library is not glibc",
)

FAULTS = """
import resource
from memtx.ops.cpu.malloc import release_freed_memory, retain_freed_memory

size = 30 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(retain_freed_memory(), faults(), faults(), release_freed_memory(), faults(), faults())
"""


def faults(**environment: str) -> list[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env={**own, **environment})
    assert told.returncode == 0, told.stderr
    return told.stdout.split()


@glibc
def test_pages_are_not_cleared_twice() -> None:
    kept, _, again, given_back, *cleared = faults()
    assert (kept, given_back) == ("True", "True")
    # 30 MiB are 15 pages at the least (of 2 MiB), 7,680 at the most; a few others may come in by themselves.
    assert int(again) < 8
    assert all(int(one) >= 15 for one in cleared)


@glibc
def test_the_user_chooses_first() -> None:
    kept, *_ = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
