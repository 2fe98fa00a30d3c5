"""What the system says of its processor."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def read_cpu_info() -> dict[str, str]:
    """Return the fields of the first core, such as ``flags``; its name alone where the system does not tell."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {"model name": platform.processor()}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
