"""Benchmark attention by backend: causal window 512, 8 heads of 64, short segments and long calls.

    python scripts/bench_attention.py [--json FILE] [--plot PNG] [--markdown FILE]

Two shapes: a batch of 4 with a segment of 512 after a cache of 511, and a single sequence of 4,096 to 65,536 positions,
over which the time should grow linearly. Useful FLOPs count visible pairs (backward costs twice the forward pass;
recomputed scores do not count) and are compared with the matrix peak measured in the same run, before each shape. Masks
are built before the clock starts, since the layers of one call share them. Repeats alternate between the backends, so
that drift of the machine affects all alike. Backends that store a score or mask for each pair of positions are skipped,
and listed, where these do not fit into memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import benchmarking
import numpy as np
import torch
from benchmarking import Spread, format_mib
from torch import Tensor
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask, num_visible_pairs
from memtx.ops.cpu.malloc import release_freed_memory, retain_freed_memory
from memtx.training import cost

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

MEMTX_BACKENDS: tuple[AttentionBackend, ...] = ("cpp", "banded", "reference", "flex", "triton")
PEER_BACKENDS = ("sdpa-dense", "local-attention", "flash-attn")
PASS_COSTS = {"forward": 1.0, "forward+backward": 3.0}
"""Cost of each pass in forward passes: two products forward, four backward."""


@dataclass(frozen=True)
class Shape:
    """One size of the operation.

    Attributes:
        batch_size: Batch size.
        num_queries: Number of queries.
        cache_length: Number of keys before them.
    """

    batch_size: int
    num_queries: int
    cache_length: int

    def __str__(self) -> str:
        cache = f" after {self.cache_length:,}" if self.cache_length else ""
        return f"{self.batch_size} x {self.num_queries:,}{cache}"


def causal_window(shape: Shape, window: int, device: torch.device) -> Visibility:
    """Return the visibility of a causal window: each position sees itself and the ``window - 1`` before it."""
    visible_from = torch.arange(-shape.cache_length, shape.num_queries, device=device)[None]
    key_range = KeyRange(shape.cache_length + shape.num_queries, -shape.cache_length, 1, window)
    return Visibility(visible_from, visible_from + window, shape.num_queries, (key_range,))


def build_attention(
    name: str, shape: Shape, window: int, heads: int, visibility: Visibility, max_bytes: float
) -> AttentionFn | str:
    """Return the function of a backend for a shape, or the reason why there is none."""
    device = visibility.visible_from.device.type
    mask = 4.0 * shape.batch_size * shape.num_queries * visibility.num_keys
    # Fused attention needs one dense mask; unfused attention needs its size for every head.
    dense = {"sdpa-dense": mask, "reference": heads * mask, "flex": heads * mask if device == "cpu" else 0.0}
    if dense.get(name, 0) > max_bytes:
        return f"dense scores or masks take too much memory ({dense[name] / 2**30:,.1f} GiB at {shape})"
    if name in MEMTX_BACKENDS:
        return lambda q, k, v: segment_attention(q, k, v, visibility, backend=name)[0]  # type: ignore[arg-type]
    if name == "sdpa-dense":
        return partial(F.scaled_dot_product_attention, attn_mask=create_mask(visibility)[:, None])
    if name == "flash-attn":
        available = device == "cuda" and find_spec("flash_attn")
        return build_flash_attention(window) if available else "needs CUDA and flash-attn"
    if find_spec("local_attention") is None:
        return "not installed: pip install --no-deps local-attention hyper-connections torch-einops-utils"
    if shape.cache_length or shape.num_queries % window:
        return "needs as many queries as keys, in whole windows"
    library: Any = importlib.import_module("local_attention")
    attention: AttentionFn = library.LocalAttention(
        window, causal=True, look_backward=1, exact_windowsize=True, use_rotary_pos_emb=False
    )
    return attention


def build_flash_attention(window: int) -> AttentionFn:
    """Return flash-attention with its own window, for inputs of shape (batch, heads, length, head_dim)."""
    library: Any = importlib.import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = library.flash_attn_func(*inputs, causal=True, window_size=(window - 1, 0))
        return out.transpose(1, 2)

    return attend


@dataclass(frozen=True)
class Case:
    """A backend's pass over random queries, keys and values."""

    attend: AttentionFn
    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor | None

    def __call__(self) -> None:
        """Run the pass once."""
        if self.grad is None:
            with torch.no_grad():
                self.attend(*self.inputs)
        else:
            torch.autograd.grad(self.attend(*self.inputs), self.inputs, self.grad)


def random_inputs(shape: Shape, arguments: argparse.Namespace, dtype: str, backward: bool) -> tuple[Any, Tensor | None]:
    """Return queries, keys and values in a layer's memory layout (heads before width), and a gradient."""

    def sample(length: int) -> Tensor:
        size = (shape.batch_size, length, arguments.heads, arguments.head_dim)
        x = torch.randn(size, device=arguments.device).to(benchmarking.DTYPES[dtype]).transpose(1, 2)
        return x.requires_grad_(backward)

    num_keys = shape.cache_length + shape.num_queries
    inputs = sample(shape.num_queries), sample(num_keys), sample(num_keys)
    return inputs, torch.randn_like(inputs[0]) if backward else None


def measure(
    shape: Shape, dtype: str, arguments: argparse.Namespace, on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row for each backend and pass over one shape in one dtype."""
    device: torch.device = arguments.device
    torch.manual_seed(0)
    visibility = causal_window(shape, arguments.window, device)
    num_pairs = float(num_visible_pairs(visibility).item())
    forward = 4.0 * arguments.heads * arguments.head_dim * shape.batch_size * num_pairs
    peak = cost.measure_peak_flops(device, benchmarking.DTYPES[dtype], arguments.peak_size)
    rows: list[dict[str, Any]] = []
    cases: dict[int, Case] = {}
    for pass_ in PASS_COSTS:
        inputs, grad = random_inputs(shape, arguments, dtype, pass_ != "forward")
        for name in arguments.backends:
            on_progress(f"{shape} {dtype} {pass_} {name}")
            row = {"backend": name, "dtype": dtype, "pass": pass_, **dataclasses.asdict(shape), "skipped_reason": None}
            rows.append(row)
            attend = build_attention(
                name, shape, arguments.window, arguments.heads, visibility, arguments.max_dense_gib * 2**30
            )
            if isinstance(attend, str):
                row["skipped_reason"] = attend
                continue
            case = Case(attend, inputs, grad)
            try:
                # The first call builds masks or compiles.
                _, row["peak_bytes"] = benchmarking.call_with_peak(case, device)
            except (MemtxError, RuntimeError) as error:
                row["skipped_reason"] = str(error).splitlines()[0]
                continue
            cases[len(rows) - 1] = case
    times: dict[int, list[float]] = {index: [] for index in cases}
    # Otherwise the system clears new pages for each output of 32 MiB or more; the first calls allocate them.
    retain_freed_memory(include_large_blocks=True)
    for case in cases.values():
        case()
    for repeat in range(arguments.repeats):
        for index, case in cases.items():
            on_progress(f"{shape} {dtype} {rows[index]['pass']} {rows[index]['backend']} {repeat + 1}")
            times[index].append(benchmarking.time_call(case, device))
    release_freed_memory()
    for index, seconds in times.items():
        useful = forward * PASS_COSTS[rows[index]["pass"]]
        spread = Spread.from_values(seconds)
        rows[index].update(
            seconds=dataclasses.asdict(spread), useful_flops=useful, flops_per_second=useful / spread.median,
            matrix_peak_flops=peak, fraction_of_matrix_peak=useful / spread.median / peak,
        )  # fmt: skip
    return rows


def fit_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the slope of log time over log length for each backend, dtype and pass; 1 is linear."""
    points: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if not row["skipped_reason"] and not row["cache_length"]:
            key = (row["backend"], row["dtype"], row["pass"])
            points.setdefault(key, []).append((row["num_queries"], row["seconds"]["median"]))
    slopes = []
    for (backend, dtype, pass_), curve in sorted(points.items()):
        if len(curve) > 1:
            lengths, seconds = (np.log(np.array(column)) for column in zip(*curve, strict=True))
            slope = float(np.polyfit(lengths, seconds, 1)[0])
            ends = {"from": math.exp(lengths.min()), "to": math.exp(lengths.max())}
            slopes.append({"backend": backend, "dtype": dtype, "pass": pass_, "slope": slope, **ends})
    return slopes


def format_table(results: dict[str, Any]) -> list[str]:
    """Format the results as Markdown: a line for each shape, dtype and pass, a column for each backend."""
    rows, backends = results["rows"], results["backends"]
    lines = [
        f"{benchmarking.format_machine(results['machine'])}. Causal window {results['window']}, "
        f"{results['heads']} heads of {results['head_dim']}. Median ms of {results['repeats']} interleaved repeats "
        "(minimum to maximum), fraction of the matrix peak in useful FLOPs, MiB allocated by the first call.",
        "",
        "| batch x queries | dtype | pass | " + " | ".join(backends) + " |",
        "|---" * (3 + len(backends)) + "|",
    ]
    grouped: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        shape = Shape(row["batch_size"], row["num_queries"], row["cache_length"])
        grouped.setdefault((str(shape), row["dtype"], row["pass"]), {})[row["backend"]] = row
    for (size, dtype, pass_), by_backend in grouped.items():
        cells = []
        for name in backends:
            row = by_backend[name]
            if row["skipped_reason"]:
                cells.append("-")
                continue
            low, mid, high = (1e3 * row["seconds"][key] for key in ("min", "median", "max"))
            fraction = row["fraction_of_matrix_peak"]
            cells.append(f"{mid:,.1f} ({low:,.1f}-{high:,.1f}), {fraction:.0%}, {format_mib(row['peak_bytes'])}")
        lines.append(f"| {size} | {dtype} | {pass_} | {' | '.join(cells)} |")
    if results["slopes"]:
        lines += ["", "| time = length^power | dtype | pass | from | to | power |", "|---|---|---|---|---|---|"]
    for fit in results["slopes"]:
        ends = f"{fit['from']:,.0f} | {fit['to']:,.0f}"
        lines.append(f"| {fit['backend']} | {fit['dtype']} | {fit['pass']} | {ends} | {fit['slope']:.3f} |")
    reasons = sorted({f"{row['backend']}: {row['skipped_reason']}" for row in rows if row["skipped_reason"]})
    return lines + [f"\nSkipped: {reason}" for reason in reasons]


def plot_results(path: str, results: dict[str, Any]) -> None:
    """Plot the forward time of the long calls over their length, in the first dtype."""
    from memtx import plots

    dtype = results["rows"][0]["dtype"]
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in results["rows"]:
        if not (row["skipped_reason"] or row["cache_length"]) and (row["dtype"], row["pass"]) == (dtype, "forward"):
            lengths, times = curves.setdefault(row["backend"], ([], []))
            lengths.append(row["num_queries"])
            times.append(1e3 * row["seconds"]["median"])
    title = f"Attention over a window of {results['window']}, forward, {dtype}"
    plots.plot_loss_curves(path, curves, title=title, x_label="positions in one call", y_label="ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*MEMTX_BACKENDS, *PEER_BACKENDS)
    parser.add_argument("--backends", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(benchmarking.DTYPES), default=list(benchmarking.DTYPES))
    parser.add_argument("--batch-size", type=int, default=4, help="batch size of the short segment")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--max-dense-gib", type=float, default=0.6, help="maximum GiB of dense scores or masks")
    benchmarking.add_size_options(parser, repeats=5, segment_length=512, window=512, heads=8, head_dim=64)
    benchmarking.add_benchmark_options(parser)
    benchmarking.add_time_limit(parser)
    arguments = parser.parse_args()
    benchmarking.apply_benchmark_options(arguments)
    if arguments.backends is None:
        arguments.backends = [name for name in names if name != "triton" or arguments.device.type == "cuda"]
    shapes = [Shape(arguments.batch_size, arguments.segment_length, arguments.window - 1)]
    shapes += [Shape(1, length, 0) for length in arguments.lengths]
    rows: list[dict[str, Any]] = []
    with benchmarking.keep_measured(arguments), benchmarking.progress_bar() as bar:
        task = bar.add_task("", total=len(shapes) * len(arguments.dtypes))
        for shape in shapes:
            for dtype in arguments.dtypes:
                rows += measure(shape, dtype, arguments, lambda text: bar.update(task, description=text))
                bar.advance(task)
    results = {
        "machine": benchmarking.machine_info(arguments.device),
        **{name: getattr(arguments, name) for name in ("backends", "repeats", "window", "heads", "head_dim")},
        "rows": rows,
        "slopes": fit_slopes(rows),
    }
    if arguments.plot and any(not row["cache_length"] for row in rows):
        plot_results(arguments.plot, results)
    benchmarking.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    main()
