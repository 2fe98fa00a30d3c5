"""What the benches share: timings with their spread, the machine's matrix peak, peak memory, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memtx import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: their median, least and greatest."""

    median: float
    min: float
    max: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return bf16 autocast for "bf16", a context that does nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def _read_proc_status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak_memory(device: torch.device) -> bool:
    """Begin to watch for the peak anew; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory held: of the GPU, else of this process; None where the system does not say.

    Not ``ru_maxrss``: Linux hands a parent's peak on to the program that its child executes.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read_proc_status("VmHWM")


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory held now, by the same count as :func:`peak_memory_bytes`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _read_proc_status("VmRSS")


class TensorMemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors made under it hold, and their most at once: exact, where a process' size is not.

    The system's figure keeps what the allocator has not handed back, and the pieces between what is in use.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self.tracked: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self.tracked.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view of what was there before, such as a weight, is nothing new.
        leaves = pytree.tree_leaves((args, kwargs))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.tracked and key not in given:
                    self.tracked.add(key)
                    self.current += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.current)
        return out


def format_mib(num_bytes: float | None) -> str:
    """Return bytes as text in MiB."""
    return (
        "-" if num_bytes is None else f"{num_bytes / MIB:,.0f}" if num_bytes >= 10 * MIB else f"{num_bytes / MIB:.2f}"
    )


def machine_info(device: torch.device) -> dict[str, Any]:
    """Say what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def format_machine(info: dict[str, Any]) -> str:
    """Return one line that says what the figures were measured on."""
    return f"{info['device']}, {info['threads']} threads, torch {info['torch']}, {info['when'][:10]}"


def positive_int(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {number}; give at least 1")
    return number


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add what every bench takes."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--num-threads", type=int, help="of torch on the CPU; by default torch's own choice")
    parser.add_argument("--peak-size", type=int, help="of the matrices that the peak is measured with")
    parser.add_argument("--json", metavar="FILE", help="all figures; - for standard output, instead of the table")
    parser.add_argument("--plot", metavar="PNG")
    parser.add_argument("--markdown", metavar="FILE", help="the table")


def apply_benchmark_options(arguments: argparse.Namespace) -> None:
    """Set threads and the peak's size, and refuse a device that is not there."""
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    # 2048 keeps a CPU busy for a tenth of a second; a GPU needs more work to show its peak.
    arguments.peak_size = arguments.peak_size or (8192 if arguments.device.type == "cuda" else 2048)


def progress_bar() -> Progress:
    """Return a progress bar on standard error, so that standard output holds results alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def write_results(arguments: argparse.Namespace, results: dict[str, Any], lines: Sequence[str]) -> None:
    """Write what was asked for, and print the table or the JSON."""
    text = "\n".join(lines) + "\n"
    if arguments.markdown:
        files.write_text(arguments.markdown, text)
    if arguments.json == "-":
        print(json.dumps(results))
        return
    if arguments.json:
        files.write_json(arguments.json, results)
    print(text, end="")
