"""Compare the memories at equal parameters and tokens on the synthetic tasks T1-T5, with three seeds.

    python scripts/compare_memories.py [--tasks NAME ...] [--memories NAME ...] [--seeds 0 1 2]

Synthetic tasks: two layers, a window of one segment in every stack (hybrids: in the second layer, the first being a
Gated DeltaNet), back-propagation through whole episodes, the loss on answers alone; accuracy at distances far beyond
those in training. Feed-forward layers shrink by a memory's parameters. compare_books.py compares memories on books.

Figures are saved in --output-dir as soon as they are measured, so the script can be interrupted and restarted; the
tables show all saved figures. Seconds are CPU seconds on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import count_parameters
from memory_stacks import MemoryFactory, comparison_stacks, hybrid_stacks
from training_runs import train_on_episodes

from memtx import files, plots
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.data.synthetic_tasks.copying import SelectiveCopying
from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
from memtx.data.synthetic_tasks.tracking import StateTracking
from memtx.evaluation.accuracy import evaluate_accuracy
from memtx.layers.feed_forward import FeedForward
from memtx.memory.copy_memory import CopyMemory
from memtx.models.memory_transformer import MemoryTransformer

TASKS: dict[str, SyntheticTask] = {
    "T1 recall": AssociativeRecall(),
    "T2 capacity": AssociativeRecall(num_pairs=12),
    "T3 overwriting": Overwrite(num_overwrites=2),
    "T4 copying": SelectiveCopying(),
    "T5 tracking": StateTracking(num_elements=2),
}
DISTANCES = {name: [3, 100, 1000] if name == "T1 recall" else [1, 3, 32] for name in TASKS}
TRAINING_SEGMENTS = 3
"""Number of segments after those that are written, in training."""

HYBRIDS = tuple(hybrid_stacks(1))
"""Stacks with a memory per layer, for the two layers of the synthetic tasks."""

COPY = "; copy"
WITH_COPY = tuple(f"{name}{COPY}" for name in ("window", "associative"))
"""Stacks with a copy memory as well."""

ABLATIONS = ("associative, plain sigmoid", "associative, no delta rule")
"""Stacks that run only if --memories names them."""

ALL_STACKS = (*comparison_stacks(1), *HYBRIDS, *WITH_COPY)

Figures = dict[str, dict[str, Any]]


def match_hidden_dim(build_model: Callable[[int], MemoryTransformer], num_parameters: int) -> int:
    """Return the feed-forward width that brings a model closest to ``num_parameters``."""

    def count(hidden_dim: int) -> int:
        with torch.device("meta"):
            return count_parameters(build_model(hidden_dim))

    low, high = count(8), count(16)
    return max(8, round(8 + 8 * (num_parameters - low) / (high - low)))


def train_on_task(name: str, memory: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a stack on a synthetic task and return its figures."""
    task, dim = TASKS[name], arguments.dim
    stacks = comparison_stacks(task.segment_length)
    base = memory.removesuffix(COPY)
    hybrid = hybrid_stacks(task.segment_length).get(base)

    def build_model(hidden_dim: int, stack: Sequence[MemoryFactory] | None = None) -> MemoryTransformer:
        memories: Any = [stack] if stack is not None else hybrid or [stacks[base]]
        return MemoryTransformer(
            task.vocab_size, dim, 2, 2, memories=memories, feed_forward=partial(FeedForward, hidden_dim=hidden_dim),
            output_memory=CopyMemory if stack is None and memory != base else None,
        )  # fmt: skip

    # All models have as many parameters as the largest stack with a feed-forward width of 2 dim.
    largest = max(count_parameters(build_model(2 * dim, stack)) for stack in stacks.values())
    torch.manual_seed(seed)
    model = build_model(arguments.hidden_dim or match_hidden_dim(build_model, largest))
    seconds = train_on_episodes(
        model, task, seed=seed, steps=arguments.steps, batch_size=arguments.batch_size,
        num_segments=task.num_write_segments + TRAINING_SEGMENTS, learning_rate=arguments.learning_rate,
    )  # fmt: skip
    evaluate = partial(evaluate_accuracy, model, task, num_samples=arguments.num_samples, seed=1000 + seed)
    return {
        "accuracy": {distance: evaluate(distance) for distance in arguments.distances or DISTANCES[name]},
        "seconds": seconds,
        "steps": arguments.steps,
        "parameters": count_parameters(model),
        "state_bytes": model.init_state(1).nbytes,
    }


def runs_of(figures: Figures, group: str, name: str) -> dict[int, dict[str, Any]]:
    """Return the figures of a memory in a group by seed."""
    return {seed: figures[key] for seed in range(100) if (key := f"{group}/{name}/{seed}") in figures}


def format_task_table(figures: Figures, task: str) -> list[str]:
    """Format a synthetic task: a line for each memory, every seed's accuracy at every distance."""
    runs_by_memory = {memory: runs_of(figures, task, memory) for memory in ALL_STACKS}
    runs_by_memory = {memory: runs for memory, runs in runs_by_memory.items() if runs}
    distances = {int(key) for runs in runs_by_memory.values() for run in runs.values() for key in run["accuracy"]}
    lines = [
        f"| {task} (chance {TASKS[task].chance_accuracy:.2f}) | "
        + " | ".join(f"{distance:,} segments" for distance in sorted(distances))
        + " | s | state bytes |",
        "|---" * (len(distances) + 3) + "|",
    ]
    for memory, runs in runs_by_memory.items():
        cells = [
            ", ".join(f"{run['accuracy'].get(str(distance), float('nan')):.2f}" for run in runs.values())
            for distance in sorted(distances)
        ]
        seconds = statistics.median(run["seconds"] for run in runs.values())
        lines.append(
            f"| {memory} | {' | '.join(cells)} | {seconds:.0f} | {next(iter(runs.values()))['state_bytes']:,} |"
        )
    return [*lines, ""] if runs_by_memory else []


def plot_results(figures: Figures, path: Path) -> None:
    """Plot the mean accuracy on T1 by distance."""
    curves = {}
    for memory in comparison_stacks(1):
        if runs := runs_of(figures, "T1 recall", memory):
            distances = sorted(map(int, next(iter(runs.values()))["accuracy"]))
            means = [statistics.mean(run["accuracy"][str(key)] for run in runs.values()) for key in distances]
            curves[memory] = (distances, means)
    if curves:
        plots.plot_accuracy(
            path, curves, chance_level=TASKS["T1 recall"].chance_accuracy, title="Recall (T1), means of seeds",
            x_label="segments since the pairs",
        )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_benchmark_options(parser)
    default = [name for name in ALL_STACKS if name not in ABLATIONS]
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-memories"), help="folder of the figures")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--memories", nargs="+", choices=ALL_STACKS, default=default, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", type=benchmarking.positive_int, help="segments up to the questions")
    parser.add_argument("--hidden-dim", type=benchmarking.positive_int, help="one feed-forward width for all stacks")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="learning rate of the synthetic tasks")
    benchmarking.add_size_options(parser, steps=750, batch_size=32, dim=64, num_samples=32)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    benchmarking.apply_benchmark_options(arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "figures.json"
    figures: Figures = json.loads(path.read_text()) if path.exists() else {}
    # Seed by seed, so that an interrupted comparison has complete seeds.
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        f"{task}/{memory}/{seed}": partial(train_on_task, task, memory, seed, arguments)
        for task in arguments.tasks
        for seed in arguments.seeds
        for memory in arguments.memories
    }
    missing = {key: job for key, job in jobs.items() if key not in figures}

    def save(key: str, result: dict[str, Any]) -> None:
        figures[key] = json.loads(json.dumps(result))  # as a restarted script would read them
        files.write_text(path, json.dumps(figures, indent=1))

    with benchmarking.progress_bar() as bar:
        for key, job in bar.track(missing.items(), description="memories"):
            save(key, job())
    machine = benchmarking.machine_info(arguments.device)
    if arguments.plot:
        plot_results(figures, Path(arguments.plot))
    lines = [f"{benchmarking.format_machine(machine)}.", ""]
    for task in TASKS:
        lines += format_task_table(figures, task)
    benchmarking.write_results(arguments, {"figures": figures, "machine": machine}, lines)


if __name__ == "__main__":
    main()
