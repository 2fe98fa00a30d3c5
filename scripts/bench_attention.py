"""The attention operation by backend: causal window 512, 8 heads of 64, short segments and long calls.

    python scripts/bench_attention.py [--json FILE] [--plot PNG] [--markdown FILE]

Two shapes: 4 rows of a segment of 512 behind a cache of 511, and one row of 4,096 to 65,536 positions, over which the
time is to grow linearly. Useful FLOPs are those of visible pairs (twice the forward pass in backward; scores made
again there are not counted); they are set beside the matrix peak measured in the same run, before each shape. Masks
are made before the clock starts, as layers of one call share them. Repeats go through all backends in turn, so that
the machine's drift hits all alike. What would need a number for each pair of positions and does not fit is left out,
and said.
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

import measuring
import numpy as np
import torch
from measuring import Spread, format_mib
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
"""What each pass costs in forward passes: two products forward, four backward."""


@dataclass(frozen=True)
class Shape:
    """One size of the operation.

    Attributes:
        batch_size: streams.
        num_queries: positions asked.
        cache_length: positions before them.
    """

    batch_size: int
    num_queries: int
    cache_length: int

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.num_queries:,}" + (
            f" after {self.cache_length:,}" if self.cache_length else ""
        )


def causal_window(shape: Shape, window: int, device: torch.device) -> Visibility:
    """Return who sees whom: each position itself and the ``window - 1`` before it."""
    born = torch.arange(-shape.cache_length, shape.num_queries, device=device)[None]
    section = KeyRange(shape.cache_length + shape.num_queries, -shape.cache_length, 1, window)
    return Visibility(born, born + window, shape.num_queries, (section,))


def build_attention(
    name: str, shape: Shape, window: int, heads: int, visibility: Visibility, max_bytes: float
) -> AttentionFn | str:
    """Return the function of a backend for a shape, or why it cannot be had."""
    device = visibility.visible_from.device.type
    mask = 4.0 * shape.batch_size * shape.num_queries * visibility.num_keys
    # Fused attention needs the mask whole; what is not fused needs it for every head.
    takes = {"sdpa-dense": mask, "reference": heads * mask, "flex": heads * mask if device == "cpu" else 0.0}.get(
        name, 0
    )
    if takes > max_bytes:
        return f"a number for each pair takes too much memory ({takes / 2**30:,.1f} GiB at {shape})"
    if name in MEMTX_BACKENDS:
        return lambda q, k, v: segment_attention(q, k, v, visibility, backend=name)[0]  # type: ignore[arg-type]
    if name == "sdpa-dense":
        return partial(F.scaled_dot_product_attention, attn_mask=create_mask(visibility)[:, None])
    if name == "flash-attn":
        return (
            build_flash_attention(window)
            if device == "cuda" and find_spec("flash_attn")
            else "needs CUDA and flash-attn"
        )
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
    """Return flash-attention's own window, between (rows, heads, length, head_dim) and its order of axes."""
    library: Any = importlib.import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = library.flash_attn_func(*turned, causal=True, window_size=(window - 1, 0))
        return out.transpose(1, 2)

    return attend


@dataclass(frozen=True)
class Case:
    """One thing to be timed: a backend's pass over drawn queries, keys and values."""

    attend: AttentionFn
    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor | None

    def __call__(self) -> None:
        """Do it once."""
        if self.grad is None:
            with torch.no_grad():
                self.attend(*self.inputs)
        else:
            out = self.attend(*self.inputs)
            torch.autograd.grad(out, self.inputs, self.grad)


def random_inputs(shape: Shape, arguments: argparse.Namespace, dtype: str, backward: bool) -> tuple[Any, Tensor | None]:
    """Return queries, keys, values as a layer has them (heads beside width in memory), and a gradient."""

    def one(length: int) -> Tensor:
        size = (shape.batch_size, length, arguments.heads, arguments.head_dim)
        made = torch.randn(size, device=arguments.device).to(measuring.DTYPES[dtype]).transpose(1, 2)
        return made.requires_grad_(backward)

    keys = shape.cache_length + shape.num_queries
    inputs = one(shape.num_queries), one(keys), one(keys)
    return inputs, torch.randn_like(inputs[0]) if backward else None


def measure(
    shape: Shape, dtype: str, arguments: argparse.Namespace, on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row for each backend and pass over one shape in one type."""
    device: torch.device = arguments.device
    torch.manual_seed(0)
    visibility = causal_window(shape, arguments.window, device)
    forward = (
        4.0 * arguments.heads * arguments.head_dim * shape.batch_size * float(num_visible_pairs(visibility).item())
    )
    peak = cost.measure_peak_flops(device, measuring.DTYPES[dtype], arguments.peak_size)
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
            watched = measuring.reset_peak_memory(device)
            before = measuring.memory_bytes(device)
            try:
                case()  # the first call makes masks, or compiles
                measuring.synchronize(device)
            except (MemtxError, RuntimeError) as error:
                row["skipped_reason"] = str(error).splitlines()[0]
                continue
            after = measuring.peak_memory_bytes(device)
            row["peak_bytes"] = max(after - before, 0) if watched and after is not None and before is not None else None
            cases[len(rows) - 1] = case
    times: dict[int, list[float]] = {index: [] for index in cases}
    # Or the system's clearing of an output's pages is timed, from 32 MiB on; the first calls take them.
    retain_freed_memory(include_large_blocks=True)
    for case in cases.values():
        case()
    for repeat in range(arguments.repeats):
        for index, case in cases.items():
            on_progress(f"{shape} {dtype} {rows[index]['pass']} {rows[index]['backend']} {repeat + 1}")
            times[index].append(measuring.time_call(case, device))
    release_freed_memory()
    for index, taken in times.items():
        useful = forward * PASS_COSTS[rows[index]["pass"]]
        spread = Spread.from_values(taken)
        rows[index].update(
            seconds=dataclasses.asdict(spread),
            useful_flops=useful,
            flops_per_second=useful / spread.median,
            matrix_peak_flops=peak,
            fraction_of_matrix_peak=useful / spread.median / peak,
        )
    return rows


def fit_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each backend, type and pass the slope of log time over log length: 1 is linear."""
    found = []
    keys = sorted({(row["backend"], row["dtype"], row["pass"]) for row in rows})
    for key in keys:
        own = [
            (row["num_queries"], row["seconds"]["median"])
            for row in rows
            if (row["backend"], row["dtype"], row["pass"]) == key
            and not row["skipped_reason"]
            and not row["cache_length"]
        ]
        if len(own) > 1:
            length, taken = (np.log(np.array(column)) for column in zip(*own, strict=True))
            slope = float(np.polyfit(length, taken, 1)[0])
            ends = [math.exp(length.min()), math.exp(length.max())]
            found.append(
                {"backend": key[0], "dtype": key[1], "pass": key[2], "slope": slope, "from": ends[0], "to": ends[1]}
            )
    return found


def format_table(results: dict[str, Any]) -> list[str]:
    """Return Markdown: a row for each shape, type and pass, a column a backend."""
    rows, backends = results["rows"], results["backends"]
    lines = [
        f"{measuring.format_machine(results['machine'])}. Causal window {results['window']}, "
        f"{results['heads']} heads of {results['head_dim']}. Median ms of {results['repeats']} interleaved repeats "
        "(least to greatest), share of the matrix peak in useful FLOPs, MiB taken beside the inputs by the first call.",
        "",
        "| rows x queries | type | pass | " + " | ".join(backends) + " |",
        "|---" * (3 + len(backends)) + "|",
    ]
    by: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        shape = Shape(row["batch_size"], row["num_queries"], row["cache_length"])
        by.setdefault((str(shape), row["dtype"], row["pass"]), {})[row["backend"]] = row
    for (size, dtype, pass_), own in by.items():
        cells = []
        for name in backends:
            row = own[name]
            if row["skipped_reason"]:
                cells.append("-")
                continue
            low, mid, high = (1e3 * row["seconds"][which] for which in ("min", "median", "max"))
            share = row["fraction_of_matrix_peak"]
            cells.append(f"{mid:,.1f} ({low:,.1f}-{high:,.1f}), {share:.0%}, {format_mib(row['peak_bytes'])}")
        lines.append(f"| {size} | {dtype} | {pass_} | {' | '.join(cells)} |")
    if results["slopes"]:
        lines += [
            "",
            "| time over length, to the power | type | pass | from | to | power |",
            "|---|---|---|---|---|---|",
        ]
    for one in results["slopes"]:
        ends = f"{one['from']:,.0f} | {one['to']:,.0f}"
        lines.append(f"| {one['backend']} | {one['dtype']} | {one['pass']} | {ends} | {one['slope']:.3f} |")
    reasons = sorted({f"{row['backend']}: {row['skipped_reason']}" for row in rows if row["skipped_reason"]})
    return lines + [f"\nLeft out, {reason}" for reason in reasons]


def plot_results(path: str, results: dict[str, Any]) -> None:
    """Draw the forward time of the long calls over their length, in the first type asked for."""
    from memtx import plots

    dtype = results["rows"][0]["dtype"]
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in results["rows"]:
        if not (row["skipped_reason"] or row["cache_length"]) and (row["dtype"], row["pass"]) == (dtype, "forward"):
            lengths, taken = curves.setdefault(row["backend"], ([], []))
            lengths.append(row["num_queries"])
            taken.append(1e3 * row["seconds"]["median"])
    title = f"Attention over a window of {results['window']}, forward, {dtype}"
    plots.plot_loss_curves(path, curves, title=title, x_label="positions in one call", y_label="ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*MEMTX_BACKENDS, *PEER_BACKENDS)
    parser.add_argument("--backends", nargs="+", choices=every, metavar="NAME", help=f"of {', '.join(every)}")
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=list(measuring.DTYPES))
    parser.add_argument("--repeats", type=measuring.positive_int, default=5)
    parser.add_argument("--batch-size", type=int, default=4, help="of the short segment")
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-dense-gib", type=float, default=0.6, help="the most that numbers of all pairs may take")
    measuring.add_benchmark_options(parser)
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    if arguments.backends is None:
        arguments.backends = [name for name in every if name != "triton" or arguments.device.type == "cuda"]
    shapes = [Shape(arguments.batch_size, arguments.segment_length, arguments.window - 1)]
    shapes += [Shape(1, length, 0) for length in arguments.lengths]
    rows: list[dict[str, Any]] = []
    with measuring.progress_bar() as bar:
        task = bar.add_task("", total=len(shapes) * len(arguments.dtypes))
        for shape in shapes:
            for dtype in arguments.dtypes:
                rows += measure(shape, dtype, arguments, lambda what: bar.update(task, description=what))
                bar.advance(task)
    results = {
        "machine": measuring.machine_info(arguments.device),
        **{name: getattr(arguments, name) for name in ("backends", "repeats", "window", "heads", "head_dim")},
        "rows": rows,
        "slopes": fit_slopes(rows),
    }
    if arguments.plot and arguments.lengths:
        plot_results(arguments.plot, results)
    measuring.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    main()
