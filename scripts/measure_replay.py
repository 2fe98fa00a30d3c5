"""Measure a training step of k segments with and without replay: peak memory and time.

    python scripts/measure_replay.py [--bptt-segments 1 2 4 8 16] [--memory NAME] [--json FILE] [--markdown FILE]
        [--plot PNG]

The peak counts the tensors made by a step of k segments, without weights, gradients and moments: on a CPU by counting
tensors, on a GPU by its allocator. Plain back-propagation stores the activations of every segment; replay stores the
states between segments and the activations of one segment at a time, so its memory grows by states alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import benchmarking
import torch
from memory_stacks import replay_stacks

from memtx import plots
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import unroll

SIZES = {"batch_size": 4, "segment_length": 128, "dim": 128, "depth": 4, "heads": 4, "vocab_size": 512, "repeats": 3}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run training steps of ``bptt_segments`` segments; return their peak memory beyond that at rest, and seconds."""
    device = torch.device(task["device"])
    torch.manual_seed(0)
    segment_length, batch_size = task["segment_length"], task["batch_size"]
    length = task["bptt_segments"] * segment_length
    model = MemoryTransformer(
        task["vocab_size"], dim=task["dim"], depth=task["depth"], heads=task["heads"],
        memories=[replay_stacks(segment_length)[task["memory"]]],
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, task["vocab_size"], (batch_size, length + 1), device=device)
    document_starts = torch.zeros(batch_size, length, dtype=torch.bool, device=device)

    def step(length: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        out = unroll(
            model, tokens[:, :length], tokens[:, 1 : length + 1], document_starts[:, :length],
            model.init_state(batch_size), segment_length=segment_length, replay=task["replay"],
        )  # fmt: skip
        out.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    # The first step allocates gradients and moments.
    step(min(segment_length, 8))
    if device.type == "cuda":
        _, peak = benchmarking.call_with_peak(partial(step, length), device)
    else:
        with benchmarking.TensorMemoryTracker() as tracker:
            step(length)
        peak = tracker.peak
    times = [benchmarking.time_call(partial(step, length), device) for _ in range(task["repeats"])]
    return {
        "peak_bytes": peak, "seconds": statistics.median(times), "state_bytes": model.init_state(batch_size).nbytes,
        "machine": benchmarking.machine_info(device),
    }  # fmt: skip


def format_table(rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """Format the figures as Markdown."""
    lines = [
        f"{benchmarking.format_machine(machine)}; peak of the tensors' memory, MiB.",
        "",
        "| segments | plain | replay | replay / one segment | plain s | replay s |",
        "|---|---|---|---|---|---|",
    ]
    by_case = {(row["bptt_segments"], row["replay"]): row for row in rows}
    segment_counts = sorted({row["bptt_segments"] for row in rows})
    smallest = by_case[segment_counts[0], True]["peak_bytes"]
    for count in segment_counts:
        plain, replay = by_case[count, False], by_case[count, True]
        ratio = f"{replay['peak_bytes'] / smallest:.2f}"
        lines.append(
            f"| {count} | {benchmarking.format_mib(plain['peak_bytes'])} | "
            f"{benchmarking.format_mib(replay['peak_bytes'])} | {ratio} | "
            f"{plain['seconds']:.2f} | {replay['seconds']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_benchmark_options(parser)
    parser.add_argument("--bptt-segments", type=benchmarking.positive_int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--memory", choices=sorted(replay_stacks(4)), default="memformer")
    benchmarking.add_size_options(parser, **SIZES)
    arguments = parser.parse_args()
    benchmarking.apply_benchmark_options(arguments)
    common = {name: getattr(arguments, name) for name in ("memory", *SIZES)} | {"device": str(arguments.device)}
    tasks = [
        common | {"bptt_segments": count, "replay": replay}
        for count in arguments.bptt_segments
        for replay in (False, True)
    ]
    results: list[dict[str, Any]] = []
    with benchmarking.progress_bar() as bar:
        for task in bar.track(tasks, description="steps"):
            results.append(task | measure(task))
    machine = results[0]["machine"]
    if arguments.plot:
        series = {}
        for name, replay in (("plain", False), ("replay", True)):
            rows = [row for row in results if row["replay"] is replay]
            peaks = [row["peak_bytes"] / benchmarking.MIB for row in rows]
            series[name] = ([row["bptt_segments"] for row in rows], peaks)
        plots.plot_loss_curves(
            arguments.plot, series, title="A training step by its truncation length", x_label="segments",
            y_label="peak, MiB",
        )  # fmt: skip
    rows = [{key: value for key, value in row.items() if key != "machine"} for row in results]
    benchmarking.write_results(arguments, {"rows": rows, "machine": machine}, format_table(results, machine))


if __name__ == "__main__":
    main()
