"""Settings of glibc's malloc that keep freed memory in the process.

By default glibc returns the top of its heap to the system at once, so each training step, which frees and allocates the
same hundreds of MiB, faults these pages in again: about 20,000 page faults per step of a small model.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def current_memory_bytes(device: torch.device) -> int | None:
    """Return the memory in use in bytes, as for the peak; None if the system does not report it."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
