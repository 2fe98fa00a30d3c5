"""Shared parts of the benchmarks: timings with their spread, peak memory, the machine, options and output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memtx import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the device's work."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return bf16 autocast for "bf16", and a context without effect for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def _read_proc_status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak_memory(device: torch.device) -> bool:
    """Reset the peak memory counter; return False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of the GPU or else of this process; None if the system does not report it.

    Not ``ru_maxrss``: on Linux, a program starts with the peak of the process that executed it.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read_proc_status("VmHWM")


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory in use, counted like :func:`peak_memory_bytes`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _read_proc_status("VmRSS")


def call_with_peak(function: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Return the result of a call and the peak bytes that it used; None if the system does not report them."""
    is_reset, before = reset_peak_memory(device), memory_bytes(device)
    result = function()
    synchronize(device)
    peak = peak_memory_bytes(device)
    return result, max(peak - before, 0) if is_reset and peak is not None and before is not None else None


class TensorMemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors created inside it, and their peak.

    Exact, unlike the size of the process, which includes freed and fragmented memory of the allocator.
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
        # A view of an existing tensor, such as a weight, allocates nothing.
        inputs = pytree.tree_leaves((args, kwargs))
        input_storages = {leaf.untyped_storage()._cdata for leaf in inputs if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.tracked and key not in input_storages:
                    self.tracked.add(key)
                    self.current += size
                    weakref.finalize(storage, self._release, key, size)
        self.peak = max(self.peak, self.current)
        return out


def format_mib(num_bytes: float | None) -> str:
    """Format bytes in MiB."""
    if num_bytes is None:
        return "-"
    return f"{num_bytes / MIB:,.0f}" if num_bytes >= 10 * MIB else f"{num_bytes / MIB:.2f}"


def machine_info(device: torch.device) -> dict[str, Any]:
    """Describe the machine that runs the benchmark."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "system": platform.platform(), "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }  # fmt: skip


def format_machine(info: dict[str, Any]) -> str:
    """Format :func:`machine_info` as one line."""
    return f"{info['device']}, {info['threads']} threads, torch {info['torch']}, {info['when'][:10]}"


def count_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {number}; give at least 1")
    return number


def add_size_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add options for integers of at least 1, such as ``--batch-size`` for ``batch_size=4``."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive_int, default=default)


def add_data_option(parser: argparse.ArgumentParser, flag: str, *parts: str, text: str, required: bool = True) -> None:
    """Add an option for a data folder that defaults to ``MEMTX_DATA/parts``.

    Args:
        parser: Parser of the script.
        flag: Option, such as ``--root``.
        *parts: Path below ``MEMTX_DATA``.
        text: Help text.
        required: If True, the option is required unless ``MEMTX_DATA`` is set.
    """
    root = os.environ.get("MEMTX_DATA")
    parser.add_argument(
        flag, type=Path, default=Path(root, *parts) if root else None, required=required and not root, metavar="FOLDER",
        help=f"{text}; defaults to {'/'.join(('MEMTX_DATA', *parts))}",
    )  # fmt: skip


def add_output_options(parser: argparse.ArgumentParser, *, plot: bool = False) -> None:
    """Add ``--json``, ``--markdown`` and optionally ``--plot``."""
    parser.add_argument("--json", metavar="FILE", help="write all figures; - prints them instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    if plot:
        parser.add_argument("--plot", metavar="PNG", help="write a picture")


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every benchmark of a model."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--num-threads", type=int, help="number of CPU threads of torch; defaults to torch's choice")
    parser.add_argument("--peak-size", type=int, help="size of the matrices that measure the matrix peak")
    add_output_options(parser, plot=True)


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option of :func:`keep_measured`."""
    parser.add_argument("--max-seconds", type=positive_int, help="stop then, and write what has been measured")


class _TimeLimitReached(BaseException):
    """Raised where the time limit is reached; no handler of errors catches it."""


@contextlib.contextmanager
def keep_measured(arguments: argparse.Namespace) -> Iterator[None]:
    """End the body after ``--max-seconds`` or at an error, and set ``arguments.stop_reason``.

    :func:`write_results` then writes what has been measured, says why it is not all, and exits with code 1.
    """

    def stop(*_: object) -> None:
        raise _TimeLimitReached

    arguments.stop_reason = ""
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(arguments.max_seconds or 0)
    try:
        yield
    except _TimeLimitReached:
        arguments.stop_reason = f"Stopped after {arguments.max_seconds} s: the rest was not measured."
    except Exception as error:
        traceback.print_exc()
        arguments.stop_reason = f"Failed, the rest was not measured: {str(error).partition(chr(10))[0]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def apply_benchmark_options(arguments: argparse.Namespace) -> None:
    """Set the threads and the size of the peak's matrices; exit if the device is not available."""
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    # 2048 keeps a CPU busy for a tenth of a second; a GPU needs more work to reach its peak.
    arguments.peak_size = arguments.peak_size or (8192 if arguments.device.type == "cuda" else 2048)


def progress_bar() -> Progress:
    """Return a progress bar on standard error, so that standard output holds only results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def write_results(arguments: argparse.Namespace, results: dict[str, Any], lines: Sequence[str]) -> None:
    """Write the files of :func:`add_output_options`, and print the table or the JSON."""
    if stop_reason := getattr(arguments, "stop_reason", ""):
        results, lines = {**results, "stop_reason": stop_reason}, [*lines, "", stop_reason]
    text = "\n".join(lines) + "\n"
    if arguments.markdown:
        files.write_text(arguments.markdown, text)
    if arguments.json == "-":
        print(json.dumps(results))
    else:
        if arguments.json:
            files.write_json(arguments.json, results)
        print(text, end="")
    if stop_reason:
        sys.exit(stop_reason)
