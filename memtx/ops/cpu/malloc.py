"""What the C library does with memory that is given back: kept for the process, where glibc is the library.

By default glibc gives the end of its heap back to the system at once, and a training step, which frees and takes the
same hundreds of MiB, has their pages cleared anew: some 20,000 page faults a step of a small model.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""

_RETAIN_SETTINGS = {_TRIM_THRESHOLD: -1, _MMAP_THRESHOLD: 32 << 20}
_DEFAULT_SETTINGS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}


def _load_glibc() -> ctypes.CDLL | None:
    """Return glibc; None where another library allocates, or the user's environment chooses."""
    chosen = {name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}
    if chosen or sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set_mallopt(settings: dict[int, int]) -> bool:
    """Set parameters of mallopt; return whether it was done."""
    library = _load_glibc()
    return library is not None and all(library.mallopt(name, value) for name, value in settings.items())


def retain_freed_memory(*, include_large_blocks: bool = False) -> bool:
    """Have freed memory kept for what is allocated next.

    The process stays as large as it was at its largest. Blocks of more than 32 MiB, the most that glibc lets a program
    say, are taken from the system one by one and given back as ever.

    Args:
        include_large_blocks: keep those as well; they may leave holes that the next ones do not fit into: for
            measuring.

    Returns:
        whether it was done.
    """
    return _set_mallopt(_RETAIN_SETTINGS | ({_MMAP_MAX: 0} if include_large_blocks else {}))


def release_freed_memory() -> bool:
    """Have freed memory given back again, what is free now at once; return whether it was done."""
    done = _set_mallopt(_DEFAULT_SETTINGS)
    if done:
        ctypes.CDLL(None).malloc_trim(0)
    return done
