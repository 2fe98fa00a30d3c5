"""What a horizon of k segments costs with replay and without: peak memory and time of a training step.

    python scripts/measure_replay.py [--bptt-segments 1 2 4 8 16] [--memory NAME] [--json FILE] [--markdown FILE]
        [--plot PNG]

The figure is the most bytes that the tensors made by a step of k segments held at once, weights, gradients and
moments not counted: on a CPU by counting tensors, on a GPU by its allocator. Plain back-propagation keeps every
segment's activations, replay the states between them and one segment's activations at a time; so what replay needs
grows by states, and states are small where a memory is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measuring
import torch

from memtx import plots
from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.slots import SlotMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import unroll

MemoryFactory = Callable[[int], Memory[Any]]


def memory_stacks(window: int) -> dict[str, list[MemoryFactory]]:
    """Return the memories of a layer by the kind's name."""
    exact: MemoryFactory = partial(RecurrentMemory, window=window)
    return {
        # As published: nothing is carried but the slots.
        "memformer": [
            NoMemory,
            partial(SlotMemory, num_slots=16, interval=window, write_gate=None, token_shift=False, temperature=0.25),
        ],
        "recurrent": [exact],
        "compressed": [partial(CompressedMemory, window=window, compression_rate=4, num_entries=window // 4)],
        "associative": [exact, AssociativeMemory],
        "slots": [exact, partial(SlotMemory, num_slots=16, interval=window)],
    }


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Train some steps of one horizon; return bytes at the peak beyond those at rest, and seconds a step."""
    device = torch.device(task["device"])
    torch.manual_seed(0)
    segment, rows, horizon = task["segment_length"], task["batch_size"], task["bptt_segments"]
    model = MemoryTransformer(
        task["vocab_size"], dim=task["dim"], depth=task["depth"], heads=task["heads"],
        memories=[memory_stacks(segment)[task["memory"]]],
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, task["vocab_size"], (rows, horizon * segment + 1), device=device)
    starts = torch.zeros(rows, horizon * segment, dtype=torch.bool, device=device)

    def step(length: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        found = unroll(
            model, tokens[:, :length], tokens[:, 1 : length + 1], starts[:, :length], model.init_state(rows),
            segment_length=segment, replay=task["replay"],
        )  # fmt: skip
        found.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    # Gradients and moments are there from the first step on.
    step(min(segment, 8))
    if device.type == "cuda":
        at_rest = measuring.memory_bytes(device) or 0
        measuring.reset_peak_memory(device)
        step(horizon * segment)
        peak = (measuring.peak_memory_bytes(device) or 0) - at_rest
    else:
        with measuring.TensorMemoryTracker() as alive:
            step(horizon * segment)
        peak = alive.peak
    times = [measuring.time_call(partial(step, horizon * segment), device) for _ in range(task["repeats"])]
    return {
        "peak_bytes": peak,
        "seconds": statistics.median(times),
        "state_bytes": model.init_state(rows).nbytes,
        "machine": measuring.machine_info(device),
    }


def format_table(rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """Return the figures as Markdown."""
    lines = [
        f"{measuring.format_machine(machine)}; most bytes at once, MiB.",
        "",
        "| segments | plain | replay | replay / one segment | plain s | replay s |",
        "|---|---|---|---|---|---|",
    ]
    by = {(row["bptt_segments"], row["replay"]): row for row in rows}
    horizons = sorted({row["bptt_segments"] for row in rows})
    least = by[horizons[0], True]["peak_bytes"]
    for horizon in horizons:
        plain, replay = by[horizon, False], by[horizon, True]
        share = f"{replay['peak_bytes'] / least:.2f}"
        lines.append(
            f"| {horizon} | {measuring.format_mib(plain['peak_bytes'])} | "
            f"{measuring.format_mib(replay['peak_bytes'])} | {share} | "
            f"{plain['seconds']:.2f} | {replay['seconds']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_benchmark_options(parser)
    parser.add_argument("--bptt-segments", type=measuring.positive_int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--memory", choices=sorted(memory_stacks(4)), default="memformer")
    for name, default in (
        ("batch_size", 4),
        ("segment_length", 128),
        ("dim", 128),
        ("depth", 4),
        ("heads", 4),
        ("vocab_size", 512),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=measuring.positive_int, default=default)
    parser.add_argument("--repeats", type=measuring.positive_int, default=3, help="steps timed")
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    fixed = ("memory", "batch_size", "segment_length", "dim", "depth", "heads", "vocab_size", "repeats")
    common = {name: getattr(arguments, name) for name in fixed} | {"device": str(arguments.device)}
    tasks = [
        common | {"bptt_segments": k, "replay": replay} for k in arguments.bptt_segments for replay in (False, True)
    ]
    results: list[dict[str, Any]] = []
    with measuring.progress_bar() as bar:
        for task in bar.track(tasks, description="steps"):
            results.append(task | measure(task))
    machine = results[0]["machine"]
    if arguments.plot:
        series = {
            name: ([row["bptt_segments"] for row in chosen], [row["peak_bytes"] / measuring.MIB for row in chosen])
            for name, replay in (("plain", False), ("replay", True))
            if (chosen := [row for row in results if row["replay"] is replay])
        }
        plots.plot_loss_curves(
            arguments.plot, series, title="A training step by its horizon", x_label="segments", y_label="peak, MiB"
        )
    found = {"rows": [{key: value for key, value in row.items() if key != "machine"} for row in results]}
    measuring.write_results(
        arguments, json.loads(json.dumps(found)) | {"machine": machine}, format_table(results, machine)
    )


if __name__ == "__main__":
    main()
