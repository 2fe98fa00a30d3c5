"""Settings of glibc's malloc that keep freed memory in the process.

By default glibc returns the top of its heap to the system at once, so each training step, which frees and allocates the
same hundreds of MiB, faults these pages in again: about 20,000 page faults per step of a small model.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
"""Parameters of mallopt(3)."""

_RETAIN_SETTINGS = {_TRIM_THRESHOLD: -1, _MMAP_THRESHOLD: 32 << 20}
_DEFAULT_SETTINGS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}


def _set_mallopt(settings: dict[int, int]) -> bool:
    """Set parameters unless environment variables configure malloc or it is not glibc's; return True on success."""
    is_configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_configured or sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, value) for name, value in settings.items())


def retain_freed_memory(*, include_large_blocks: bool = False) -> bool:
    """Keep freed memory for later allocations; return True on success.

    The process stays at its peak size. Blocks above 32 MiB, glibc's limit for this setting, are still allocated from
    the system and returned to it individually. ``include_large_blocks`` keeps these too, for measurements; they may
    fragment the heap.
    """
    return _set_mallopt(_RETAIN_SETTINGS | ({_MMAP_MAX: 0} if include_large_blocks else {}))


def release_freed_memory() -> bool:
    """Restore glibc's defaults and return free memory to the system; return True on success."""
    done = _set_mallopt(_DEFAULT_SETTINGS)
    if done:
        ctypes.CDLL(None).malloc_trim(0)
    return done


def limit_arenas(max_arenas: int) -> bool:
    """Let threads share heaps; return True on success. By default each thread's own heap keeps its freed memory."""
    return _set_mallopt({_ARENA_MAX: max_arenas})
