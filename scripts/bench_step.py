"""Benchmark one training step and one segment of reading: memtx and its peers on the same job.

    python scripts/bench_step.py [--json FILE] [--plot PNG] [--markdown FILE]

Training: forward, backward and fused AdamW on one segment a step, with the carried state detached. Reading: the loss of
the next tokens in inference mode, with the state carried. Each measurement runs in a fresh process, so that its peak
memory includes nothing else but imports, which are also reported alone, and warms up until the memory is full. Rounds
alternate between the systems, so that drift of the machine affects all alike, and ratios are taken within a round.
Useful FLOPs are counted from the visible pairs and the weights, and compared with the matrix peak measured in the same
round. Peers that are not installed are listed with the command that installs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import Spread, count_parameters, format_mib
from peers import BASELINE, OPTIONAL_SYSTEMS, SYSTEMS, Job
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.models.memory_transformer import MemoryTransformer
from memtx.training import cost

MATRIX_PEAK = "matrix peak"
MODES = ("train", "read")


def useful_flops(model: MemoryTransformer, job: Job, mode: str) -> float:
    """Return the FLOPs that one step needs once the memory is full; a multiply-add counts twice.

    Backward costs twice the forward pass, once for carried states, which get no gradient; recomputation does not count.
    """
    flops = cost.count_flops(model, job.segment_length)
    return job.batch_size * job.segment_length * (flops.training if mode == "train" else flops.forward)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the matrix peaks, or one system in one mode and dtype, in this process."""
    device, job = torch.device(task["device"]), Job(**task["job"])
    if task["num_threads"]:
        torch.set_num_threads(task["num_threads"])
    if task["system"] == MATRIX_PEAK:
        dtypes = benchmarking.DTYPES.items()
        peaks = {name: cost.measure_peak_flops(device, dtype, task["peak_size"]) for name, dtype in dtypes}
        return {"peaks": peaks, "machine": benchmarking.machine_info(device)}
    system = SYSTEMS[task["system"]]
    __import__(system.module)
    imports = benchmarking.memory_bytes(device) if device.type == "cpu" else None
    torch.manual_seed(0)
    model, forward = system.build(job)
    model.to(device).train(task["mode"] == "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if task["mode"] == "train" else None
    texts = torch.randint(0, job.vocab_size, (4, job.batch_size, job.segment_length + 1), device=device)
    state: Any = None

    def step(tokens: Tensor) -> None:
        nonlocal state
        with torch.inference_mode(optimizer is None):
            with benchmarking.autocast(device, task["dtype"]):
                loss, state = forward(tokens, state)
            state = pytree.tree_map_only(Tensor, Tensor.detach, state)
            if optimizer is not None:
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    for index in range(max(job.warmup_segments, 2)):
        step(texts[index % 4])
    times = [benchmarking.time_call(partial(step, texts[index % 4]), device) for index in range(task["steps"])]
    peak = benchmarking.peak_memory_bytes(device)
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return {
        "seconds": times, "peak_bytes": peak, "imports_bytes": imports,
        "state_bytes": sum(leaf.numel() * leaf.element_size() for leaf in leaves),
        "parameters": count_parameters(model),
        "useful_flops": useful_flops(model, job, task["mode"]) if isinstance(model, MemoryTransformer) else None,
    }  # fmt: skip


def measure_in_subprocess(task: dict[str, Any]) -> dict[str, Any]:
    """Return the result of :func:`measure` in a fresh process.

    Raises:
        RuntimeError: The process failed; the message is its last error line.
    """
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    # Libraries may print lines before the result.
    return dict(json.loads(process.stdout.strip().splitlines()[-1]))


def summarize(
    rounds: list[dict[str, Any]], references: list[tuple[float, float]], tokens_per_step: int
) -> dict[str, Any]:
    """Return a system's figures over all rounds.

    Args:
        rounds: Result of :func:`measure` in each round.
        references: The baseline's tokens per second (0 without a baseline) and the matrix peak in FLOP/s, each round.
        tokens_per_step: Tokens per step.
    """
    rates = [tokens_per_step / statistics.median(result["seconds"]) for result in rounds]
    ratios = [rate / base for rate, (base, _) in zip(rates, references, strict=True) if base]
    flops = rounds[0]["useful_flops"]
    fractions = [
        (flops or 0.0) * rate / tokens_per_step / peak for rate, (_, peak) in zip(rates, references, strict=True)
    ]
    return {
        "tokens_per_second": dataclasses.asdict(Spread.from_values(rates)),
        "tokens_per_second_by_round": rates,
        "ratio_to_baseline": dataclasses.asdict(Spread.from_values(ratios)) if ratios else None,
        "useful_flops_per_step": flops,
        "fraction_of_matrix_peak": dataclasses.asdict(Spread.from_values(fractions)) if flops else None,
        "peak_bytes": max((result["peak_bytes"] for result in rounds if result["peak_bytes"]), default=None),
        **{name: rounds[0][name] for name in ("imports_bytes", "state_bytes", "parameters")},
    }


def format_table(results: dict[str, Any]) -> list[str]:
    """Format the results as Markdown: a table for each mode, the fastest system first."""
    job, peaks = results["job"], results["matrix_peak_flops"]
    peak_text = ", ".join(f"{name} {spread['median'] / 1e9:,.0f} GFLOP/s" for name, spread in peaks.items())
    lines = [
        f"{benchmarking.format_machine(results['machine'])}; matrix peak {peak_text}. dim {job['dim']}, "
        f"{job['depth']} layers, {job['heads']} heads, vocabulary {job['vocab_size']}, batch {job['batch_size']} x "
        f"{job['segment_length']}, cache {job['cache_length']}, memory {job['memory_length']}. Medians of "
        f"{results['rounds']} interleaved rounds, minimum to maximum in brackets; ratios within a round, to "
        f"{BASELINE} in {results['baseline_dtype']}. Peak memory includes imports."
    ]
    for mode in MODES:
        rows = [row for row in results["rows"] if row["mode"] == mode]
        if not rows:
            continue
        lines += ["", f"| {mode} | tokens/s | ratio | of matrix peak | peak MiB | state MiB | parameters |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted(rows, key=lambda row: -float(row["tokens_per_second"]["median"])):
            rate, ratio, fraction = row["tokens_per_second"], row["ratio_to_baseline"], row["fraction_of_matrix_peak"]
            cells = [
                f"{row['system']} {row['dtype']}",
                f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-",
                f"{fraction['median']:.0%}" if fraction else "-",
                f"{format_mib(row['peak_bytes'])} (imports {format_mib(row['imports_bytes'])})",
                format_mib(row["state_bytes"]),
                f"{row['parameters'] / 1e6:.1f} M",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nNot installed: {name} (`{command}`)." for name, command in results["absent"].items()]
    lines += [f"\nFailed: {name}: {error}" for name, error in results["failed"].items()]
    return lines


def plot_results(path: str, results: dict[str, Any], modes: list[str]) -> None:
    """Plot one picture for each mode; with two modes, the file names end in the mode."""
    from memtx import plots

    for mode in modes:
        rows = {
            f"{row['system']} {row['dtype']}": row["tokens_per_second_by_round"]
            for row in results["rows"]
            if row["mode"] == mode
        }
        target = Path(path)
        target = target if len(modes) == 1 else target.with_stem(f"{target.stem}-{mode}")
        title = {"train": "Training", "read": "Reading"}[mode]
        plots.plot_seed_comparison(
            target, rows, title=f"{title}, one job", unit="tokens per second", lower_is_better=False
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in SYSTEMS if name not in OPTIONAL_SYSTEMS]
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=default, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=list(benchmarking.DTYPES), default=list(benchmarking.DTYPES))
    parser.add_argument("--peer-dtypes", nargs="+", choices=list(benchmarking.DTYPES), default=["fp32"])
    parser.add_argument(
        "--steps", type=benchmarking.positive_int, default=3, help="timed steps in each round; the median is used"
    )
    for field in dataclasses.fields(Job):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    benchmarking.add_size_options(parser, rounds=5)
    benchmarking.add_benchmark_options(parser)
    benchmarking.add_time_limit(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    benchmarking.apply_benchmark_options(arguments)
    job = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Job)}
    absent = {name: SYSTEMS[name].install for name in arguments.systems if find_spec(SYSTEMS[name].module) is None}
    cases = [
        (mode, name, dtype)
        for mode in arguments.modes
        for name in arguments.systems
        for dtype in (arguments.dtypes if name.startswith("memtx") else arguments.peer_dtypes)
        if name not in absent
    ]
    common = {
        "device": str(arguments.device), "num_threads": arguments.num_threads, "job": job, "steps": arguments.steps,
    }  # fmt: skip
    peak_task = {**common, "system": MATRIX_PEAK, "peak_size": arguments.peak_size}
    results_by_case: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    failed: dict[str, str] = {}
    peaks: list[dict[str, float]] = []
    with benchmarking.keep_measured(arguments), benchmarking.progress_bar() as bar:
        task = bar.add_task("", total=arguments.rounds * (len(cases) + 1))
        for _ in range(arguments.rounds):
            bar.update(task, description=MATRIX_PEAK, advance=1)
            peak_result = measure_in_subprocess(peak_task)
            peaks.append(peak_result["peaks"])
            for case in cases:
                bar.update(task, description=" ".join(case), advance=1)
                if " ".join(case) in failed:
                    continue
                mode, name, dtype = case
                try:
                    result = measure_in_subprocess({**common, "mode": mode, "system": name, "dtype": dtype})
                    results_by_case[case].append(result)
                except RuntimeError as error:
                    failed[" ".join(case)] = str(error)
    if arguments.stop_reason:
        # The rounds in which all have been measured; in the first one, those that have been.
        arguments.rounds = max(1, min(map(len, results_by_case.values())))
        results_by_case = {case: rounds[: arguments.rounds] for case, rounds in results_by_case.items()}
        peaks = peaks[: arguments.rounds]
        if not peaks:
            sys.exit(arguments.stop_reason)
    tokens = arguments.batch_size * arguments.segment_length
    baseline_dtype = arguments.peer_dtypes[0]
    rows = []
    for (mode, name, dtype), rounds in results_by_case.items():
        if len(rounds) < arguments.rounds:
            continue
        baseline = results_by_case.get((mode, BASELINE, baseline_dtype), [])
        rates = [tokens / statistics.median(result["seconds"]) for result in baseline]
        rates = rates if len(rates) == arguments.rounds else [0.0] * arguments.rounds
        references = list(zip(rates, (peak[dtype] for peak in peaks), strict=True))
        rows.append({"system": name, "mode": mode, "dtype": dtype, **summarize(rounds, references, tokens)})
    results = {
        "machine": peak_result["machine"],
        "job": job,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "baseline": BASELINE,
        "baseline_dtype": baseline_dtype,
        "matrix_peak_flops": {
            name: dataclasses.asdict(Spread.from_values([peak[name] for peak in peaks])) for name in benchmarking.DTYPES
        },
        "rows": rows,
        "absent": {name: f"pip install --no-deps {packages}" for name, packages in absent.items()},
        "failed": failed,
    }
    if arguments.plot and rows:
        plot_results(arguments.plot, results, arguments.modes)
    benchmarking.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--task":
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
