"""One training step and one segment of reading: memtx beside its peers, one job for all.

    python scripts/bench_step.py [--json FILE] [--plot PNG] [--markdown FILE]

Training: forward, backward, fused AdamW, one segment a step, what is carried cut from the graph. Reading: the next
tokens' loss in inference mode, the state carried. Each measurement is a process of its own (so peak memory is its
own, imports included; those are said apart), warmed up until the memory is full. Rounds go through all systems, so
that the machine's drift hits all alike, and ratios are taken within a round. Useful FLOPs are counted from who sees
whom and the weights, and set beside the matrix peak measured in the same round. Peers that are not installed are
named, with how to get them.
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

import measuring
import torch
from measuring import Spread, format_mib
from peers import BASELINE, OPTIONAL_SYSTEMS, SYSTEMS, Job
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.models.memory_transformer import MemoryTransformer
from memtx.training import cost

MATRIX_PEAK = "matrix peak"
MODES = ("train", "read")


def useful_flops(model: MemoryTransformer, job: Job, mode: str) -> float:
    """Return the operations that one step must do once the memory is full; a multiply-add counts twice.

    Backward counts twice the forward pass, once where carried states get no gradient; recomputation is not counted.
    """
    found = cost.count_flops(model, job.segment_length)
    return job.batch_size * job.segment_length * (found.training if mode == "train" else found.forward)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Do one process's part: the matrix peaks, or one system in one mode and type."""
    device, job = torch.device(task["device"]), Job(**task["job"])
    if task["num_threads"]:
        torch.set_num_threads(task["num_threads"])
    if task["system"] == MATRIX_PEAK:
        kinds = {name: measuring.DTYPES[name] for name in task["dtypes"]}
        found = {name: cost.measure_peak_flops(device, kind, task["peak_size"]) for name, kind in kinds.items()}
        return {"peaks": found, "machine": measuring.machine_info(device)}
    system = SYSTEMS[task["system"]]
    __import__(system.module)
    imports = measuring.memory_bytes(device) if device.type == "cpu" else None
    torch.manual_seed(0)
    model, forward = system.build(job)
    model.to(device).train(task["mode"] == "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if task["mode"] == "train" else None
    texts = torch.randint(0, job.vocab_size, (4, job.batch_size, job.segment_length + 1), device=device)
    state: Any = None

    def step(tokens: Tensor) -> None:
        nonlocal state
        with torch.inference_mode(optimizer is None):
            with measuring.autocast(device, task["dtype"]):
                loss, state = forward(tokens, state)
            state = pytree.tree_map_only(Tensor, Tensor.detach, state)
            if optimizer is not None:
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    for number in range(max(job.warmup_segments, 2)):
        step(texts[number % 4])
    times = [measuring.time_call(partial(step, texts[number % 4]), device) for number in range(task["steps"])]
    peak = measuring.peak_memory_bytes(device)
    carried = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return {
        "seconds": times,
        "peak_bytes": peak,
        "imports_bytes": imports,
        "state_bytes": sum(leaf.numel() * leaf.element_size() for leaf in carried),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "useful_flops": useful_flops(model, job, task["mode"]) if isinstance(model, MemoryTransformer) else None,
    }


def measure_in_subprocess(task: dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`measure` gives in a fresh process.

    Raises:
        RuntimeError: it failed; its last line of complaint.
    """
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    # A library may print what it likes before.
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summarize(
    rounds: list[dict[str, Any]], references: list[tuple[float, float]], tokens_per_step: int
) -> dict[str, Any]:
    """Return one row's figures from its rounds.

    Args:
        rounds: what :func:`measure` gave in each.
        references: in each, the baseline's tokens per second (0 where there is none) and the matrix peak in FLOP/s.
        tokens_per_step: a step.
    """
    rates = [tokens_per_step / statistics.median(one["seconds"]) for one in rounds]
    ratios = [rate / base for rate, (base, _) in zip(rates, references, strict=True) if base]
    flops = rounds[0]["useful_flops"]
    shares = (
        [flops * rate / tokens_per_step / peak for rate, (_, peak) in zip(rates, references, strict=True)]
        if flops
        else []
    )
    return {
        "tokens_per_second": dataclasses.asdict(Spread.from_values(rates)),
        "tokens_per_second_by_round": rates,
        "ratio_to_baseline": dataclasses.asdict(Spread.from_values(ratios)) if ratios else None,
        "useful_flops_per_step": flops,
        "fraction_of_matrix_peak": dataclasses.asdict(Spread.from_values(shares)) if shares else None,
        "peak_bytes": max((one["peak_bytes"] for one in rounds if one["peak_bytes"]), default=None),
        **{name: rounds[0][name] for name in ("imports_bytes", "state_bytes", "parameters")},
    }


def format_table(results: dict[str, Any]) -> list[str]:
    """Return Markdown: a table a mode, the fastest first."""
    job, peaks = results["job"], results["matrix_peak_flops"]
    said = ", ".join(f"{name} {spread['median'] / 1e9:,.0f} GFLOP/s" for name, spread in peaks.items())
    lines = [
        f"{measuring.format_machine(results['machine'])}; matrix peak {said}. dim {job['dim']}, {job['depth']} layers, "
        f"{job['heads']} heads, vocabulary {job['vocab_size']}, {job['batch_size']} rows of {job['segment_length']}, "
        f"cache {job['cache_length']}, memory {job['memory_length']}. Medians of {results['rounds']} interleaved "
        f"rounds, least to greatest in brackets; ratios within a round, to {BASELINE} in "
        f"{results['baseline_dtype']}. Peak memory includes imports."
    ]
    for mode in MODES:
        rows = [row for row in results["rows"] if row["mode"] == mode]
        if not rows:
            continue
        lines += ["", f"| {mode} | tokens/s | ratio | of matrix peak | peak MiB | state MiB | parameters |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted(rows, key=lambda row: -float(row["tokens_per_second"]["median"])):
            rate, ratio, share = row["tokens_per_second"], row["ratio_to_baseline"], row["fraction_of_matrix_peak"]
            cells = [
                f"{row['system']} {row['dtype']}",
                f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-",
                f"{share['median']:.0%}" if share else "-",
                f"{format_mib(row['peak_bytes'])} (imports {format_mib(row['imports_bytes'])})",
                format_mib(row["state_bytes"]),
                f"{row['parameters'] / 1e6:.1f} M",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nNot installed: {name} (`{how}`)." for name, how in results["absent"].items()]
    lines += [f"\nFailed: {name}: {why}" for name, why in results["failed"].items()]
    return lines


def plot_results(path: str, results: dict[str, Any], modes: list[str]) -> None:
    """Draw a picture a mode; the mode is put into the name where there are two."""
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
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=list(measuring.DTYPES))
    parser.add_argument("--peer-dtypes", nargs="+", choices=list(measuring.DTYPES), default=["fp32"])
    parser.add_argument("--rounds", type=measuring.positive_int, default=5)
    parser.add_argument(
        "--steps", type=measuring.positive_int, default=3, help="timed steps a round, of which the median counts"
    )
    for field in dataclasses.fields(Job):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    measuring.add_benchmark_options(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    measuring.apply_benchmark_options(arguments)
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
        "device": str(arguments.device),
        "num_threads": arguments.num_threads,
        "job": job,
        "steps": arguments.steps,
    }
    asked = {"system": MATRIX_PEAK, "dtypes": list(measuring.DTYPES), "peak_size": arguments.peak_size}
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    failed: dict[str, str] = {}
    peaks: list[dict[str, float]] = []
    with measuring.progress_bar() as bar:
        task = bar.add_task("", total=arguments.rounds * (len(cases) + 1))
        for _ in range(arguments.rounds):
            bar.update(task, description=MATRIX_PEAK, advance=1)
            said = measure_in_subprocess({**common, **asked})
            peaks.append(said["peaks"])
            for case in cases:
                bar.update(task, description=" ".join(case), advance=1)
                if " ".join(case) in failed:
                    continue
                try:
                    mode, name, dtype = case
                    found[case].append(measure_in_subprocess({**common, "mode": mode, "system": name, "dtype": dtype}))
                except RuntimeError as error:
                    failed[" ".join(case)] = str(error)
    tokens = arguments.batch_size * arguments.segment_length
    baseline_dtype = arguments.peer_dtypes[0]
    rows = []
    for (mode, name, dtype), rounds in found.items():
        if len(rounds) < arguments.rounds:
            continue
        base = found.get((mode, BASELINE, baseline_dtype), [])
        rates = [tokens / statistics.median(one["seconds"]) for one in base]
        rates = rates if len(rates) == arguments.rounds else [0.0] * arguments.rounds
        paired = list(zip(rates, (one[dtype] for one in peaks), strict=True))
        rows.append({"system": name, "mode": mode, "dtype": dtype, **summarize(rounds, paired, tokens)})
    results = {
        "machine": said["machine"],
        "job": job,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "baseline": BASELINE,
        "baseline_dtype": baseline_dtype,
        "matrix_peak_flops": {
            name: dataclasses.asdict(Spread.from_values([one[name] for one in peaks])) for name in measuring.DTYPES
        },
        "rows": rows,
        "absent": {name: f"pip install --no-deps {how}" for name, how in absent.items()},
        "failed": failed,
    }
    if arguments.plot and rows:
        plot_results(arguments.plot, results, arguments.modes)
    measuring.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--task":
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
