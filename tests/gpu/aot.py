"""Compilation of Triton kernels exactly as they are launched, for GPUs that exist in name only.

A launch becomes a compilation, so that alignments and constants are those of a real one.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MAX_SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a block may have: A100, RTX 3090, RTX 4090 and L4, H100, B200."""


class TargetDriver:
    """A driver that knows its target and runs nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def set_current_device(self, device: Any) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "void*"

    @staticmethod
    def is_active() -> bool:
        return True


def activate_target(arch: int) -> None:
    """Make Triton compile for ``arch``."""
    driver.set_active(TargetDriver(arch))


@dataclass
class Launch:
    """A launch of a kernel: its name, grid and compiled code."""

    kernel: str
    grid: tuple[int, ...]
    compiled: Any


@contextlib.contextmanager
def record_launches(arch: int, *modules: Any) -> Iterator[list[Launch]]:
    """Compile for ``arch`` instead of launching; kernels of the modules compiled for another chip are forgotten."""
    launches: list[Launch] = []
    run = JITFunction.run
    for module in modules:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self._fn_name.rpartition(".")[2], tuple(grid), compiled))
        return compiled

    with patch.object(driver, "_active", TargetDriver(arch)), patch.object(JITFunction, "run", compile_launch):
        yield launches


def read_ptxas_log(compiled: Any, arch: int) -> dict[str, int]:
    """Return the registers of a kernel and the bytes that it spills."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        tool = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(tool), "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", str(source), "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", log, re.DOTALL)
    assert numbers is not None, log
    stored, loaded, registers = map(int, numbers.groups())
    return {"registers": registers, "spilled": stored + loaded}
