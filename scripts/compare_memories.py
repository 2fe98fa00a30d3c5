"""Every memory at equal parameters and equal tokens, on the drawn tasks T1-T5 and on real books, three seeds.

    python scripts/compare_memories.py [--tasks NAME ...] [--memories NAME ...] [--seeds 0 1 2] [--books PATH/pg19-mini]

Drawn tasks: two layers, a window of one segment beside every memory, one gradient through a whole episode, the loss on
answers alone; accuracy at distances far beyond the trained one. Books (with --books): configs/pg19-mini.yaml with each
memory at three layers of 128, --book-steps steps of 16 rows x 2 segments x 64 bytes, validation bits per byte. What a
memory's own maps take is taken from the feed-forward parts. Each figure is kept in --output-dir as it is found, so the
script can be stopped and started, and the tables are of all that is there. Seconds are the process' own on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch
from learning import last_value, run_fit, train_on_episodes

from memtx import class_config, files, plots
from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.data.synthetic_tasks.copying import SelectiveCopying
from memtx.data.synthetic_tasks.recall import AssociativeRecall, Overwrite
from memtx.data.synthetic_tasks.tracking import StateTracking
from memtx.evaluation.accuracy import evaluate_accuracy
from memtx.layers.feed_forward import FeedForward, SwiGLU
from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import MeanPooling
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.parts import ReflectingGate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.slots import SlotMemory
from memtx.memory.top_k import TopKMemory
from memtx.models.memory_transformer import MemoryTransformer

MemoryFactory = Callable[[int], Memory[Any]]

TASKS: dict[str, SyntheticTask] = {
    "T1 recall": AssociativeRecall(),
    "T2 capacity": AssociativeRecall(num_pairs=12),
    "T3 overwriting": Overwrite(num_overwrites=2),
    "T4 copying": SelectiveCopying(),
    "T5 tracking": StateTracking(num_elements=2),
}
DISTANCES = {"T1 recall": [3, 100, 1000], **{name: [1, 3, 32] for name in list(TASKS)[1:]}}
TRAINING_SEGMENTS = 3
"""Segments behind the written ones in training."""


def memory_stacks(window: int) -> dict[str, list[MemoryFactory]]:
    """Return every kind's stack for a window of one segment."""
    exact: MemoryFactory = partial(RecurrentMemory, window=window)
    quarter = max(window // 4, 1)
    keeping: Any = partial(AssociativeMemory, heads=2, decay_gate=None)
    delta = partial(keeping, write_penalty=0.1)
    return {
        "window": [exact],
        "recurrent, 2.5 windows": [partial(RecurrentMemory, window=5 * window // 2)],
        "compressed 4:1": [
            partial(
                CompressedMemory,
                window=window,
                compression_rate=4,
                num_entries=3 * window // 2,
                compression=MeanPooling,
            )
        ],
        "scored, exact": [partial(TopKMemory, window=window, compression_rate=1, num_entries=3 * window // 2)],
        "associative": [exact, delta],
        "associative, reflecting": [exact, partial(keeping, write_gate=ReflectingGate)],
        "associative, no price": [exact, keeping],
        "associative, forgetting": [exact, partial(AssociativeMemory, heads=2)],
        "dual": [partial(TopKMemory, window=window, compression_rate=1, num_entries=2 * quarter), delta],
        "slots": [exact, partial(SlotMemory, num_slots=8, interval=window, heads=4)],
        "tokens": [exact, partial(TokenMemory, num_tokens=8, interval=window)],
        "retrieval": [exact, partial(RetrievalMemory, capacity=16 * window, top_k=8, exclude_recent=window, heads=2)],
    }


def match_hidden_dim(build_model: Callable[[int], MemoryTransformer], num_parameters: int) -> int:
    """Return the feed-forward width at which a model's parameters come nearest to ``num_parameters``."""

    def count(hidden_dim: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_model(hidden_dim).parameters())

    low, high = count(8), count(16)
    return max(8, round(8 + 8 * (num_parameters - low) / (high - low)))


def train_on_task(name: str, kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a kind on a task and return its figures."""
    task, stack = TASKS[name], memory_stacks(TASKS[name].segment_length)[kind]
    dim, rows = arguments.dim, arguments.batch_size

    def build_model(hidden_dim: int, memories: Sequence[MemoryFactory] = stack) -> MemoryTransformer:
        return MemoryTransformer(
            task.vocab_size, dim, 2, 2, memories=[memories], feed_forward=partial(FeedForward, hidden_dim=hidden_dim)
        )

    # What the widest kind has with a feed-forward part of 2 dim.
    widest = max(
        sum(one.numel() for one in build_model(2 * dim, other).parameters())
        for other in memory_stacks(task.segment_length).values()
    )
    torch.manual_seed(seed)
    model = build_model(match_hidden_dim(build_model, widest))
    segments = task.num_write_segments + TRAINING_SEGMENTS
    spent = train_on_episodes(
        model,
        task,
        seed=seed,
        steps=arguments.steps,
        batch_size=rows,
        num_segments=segments,
        learning_rate=arguments.learning_rate,
    )
    distances = [distance for distance in DISTANCES[name] if distance <= arguments.max_distance]
    shares = {distance: evaluate_accuracy(model, task, distance, seed=1000 + seed) for distance in distances}
    return {
        "accuracy": shares,
        "seconds": spent,
        "steps": arguments.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes": model.init_state(1).nbytes,
    }


def train_on_books(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a kind on the books and return its figures."""
    dim, depth, heads, window, stack = 128, 3, 4, 64, memory_stacks(64)[kind]

    def build_model(hidden_dim: int, memories: Sequence[MemoryFactory] = stack) -> MemoryTransformer:
        return MemoryTransformer(
            257, dim, depth, heads, memories=[memories], feed_forward=partial(SwiGLU, hidden_dim=hidden_dim)
        )

    plain = sum(
        parameter.numel() for parameter in build_model(384, [partial(RecurrentMemory, window=window)]).parameters()
    )
    run = arguments.output_dir / f"books-{kind.replace(' ', '-')}-{seed}"
    model = "--model.model.init_args"
    settings = [
        f"{model}.dim={dim}", f"{model}.depth={depth}", f"{model}.heads={heads}",
        f"{model}.memories={json.dumps([class_config.to_config(stack)])}",
        f"{model}.feed_forward.init_args.hidden_dim={match_hidden_dim(build_model, plain)}",
        # Learned writing needs a horizon of two segments at least; the bytes of a step stay.
        "--data.bptt_segments=2", "--data.batch_size=16", "--data.eval_tokens=100000",
        f"--trainer.max_steps={arguments.book_steps}", f"--trainer.val_check_interval={arguments.book_steps}",
    ]  # fmt: skip
    before = os.times()
    lines = run_fit(run, "configs/pg19-mini.yaml", arguments.books, seed, settings)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return {
        "bits_per_byte": last_value(lines, "val_bits_per_byte"),
        # Nothing is carried, nothing is gained.
        "memory_gain": last_value(lines, "val_memory_gain") if "val_memory_gain" in lines[0] else float("nan"),
        "seconds": spent,
        "steps": arguments.book_steps,
    }


def format_tables(figures: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """Return a Markdown table a task, a row a kind: every seed's figure at every distance."""
    lines: list[str] = []
    for task, distances in DISTANCES.items():
        rows = []
        for kind in memory_stacks(TASKS[task].segment_length):
            runs = [figures[key] for seed in range(100) if (key := f"{task}/{kind}/{seed}") in figures]
            if not runs:
                continue
            cells = [
                ", ".join(f"{run['accuracy'].get(str(distance), float('nan')):.2f}" for run in runs)
                for distance in distances
            ]
            spent = statistics.median(run["seconds"] for run in runs)
            rows.append(f"| {kind} | {' | '.join(cells)} | {spent:.0f} | {runs[0]['state_bytes']:,} |")
        if rows:
            head = " | ".join(f"{distance:,} segments" for distance in distances)
            chance = f"{task} (chance {TASKS[task].chance_accuracy:.2f})"
            lines += [f"| {chance} | {head} | s | state bytes |", "|---" * (len(distances) + 3) + "|", *rows, ""]
    rows = []
    for kind in memory_stacks(64):
        runs = [figures[key] for seed in range(100) if (key := f"books/{kind}/{seed}") in figures]
        if runs:
            scores = [", ".join(f"{run[name]:.4f}" for run in runs) for name in ("bits_per_byte", "memory_gain")]
            rows.append(f"| {kind} | {scores[0]} | {scores[1]} | {statistics.median(r['seconds'] for r in runs):.0f} |")
    if rows:
        lines += [f"| books, {arguments.book_steps} steps | bits per byte | worse with it cleared | s |"]
        lines += ["|---|---|---|---|", *rows, ""]
    return lines


def plot_recall(figures: dict[str, dict[str, Any]], path: str) -> None:
    """Draw T1's mean accuracy by distance, a line a kind."""
    distances = DISTANCES["T1 recall"]
    curves = {}
    for kind in memory_stacks(24):
        runs = [figures[key] for seed in range(100) if (key := f"T1 recall/{kind}/{seed}") in figures]
        if runs:
            asked = [distance for distance in distances if str(distance) in runs[0]["accuracy"]]
            curves[kind] = (
                asked,
                [statistics.mean(run["accuracy"][str(distance)] for run in runs) for distance in asked],
            )
    title, axis = "Recall (T1), means of seeds", "segments since the pairs"
    plots.plot_accuracy(path, curves, chance_level=TASKS["T1 recall"].chance_accuracy, title=title, x_label=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_benchmark_options(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-memories"), help="where figures are kept")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--memories", nargs="+", choices=list(memory_stacks(1)), default=list(memory_stacks(1)), metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--books", type=Path, help="a folder of books in PG-19's layout")
    for name, default in (("steps", 750), ("batch-size", 32), ("dim", 64), ("book-steps", 600)):
        parser.add_argument(f"--{name}", type=measuring.positive_int, default=default)
    parser.add_argument(
        "--max-distance", type=measuring.positive_int, default=1000, help="segments asked across, at most"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the learning rate of the drawn tasks")
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    kept = arguments.output_dir / "figures.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    jobs = [
        (f"{task}/{kind}/{seed}", partial(train_on_task, task, kind, seed, arguments))
        for task in arguments.tasks
        for seed in arguments.seeds  # seed by seed, so that a stopped comparison has whole seeds
        for kind in arguments.memories
    ]
    if arguments.books is not None:
        jobs += [
            (f"books/{kind}/{seed}", partial(train_on_books, kind, seed, arguments))
            for seed in arguments.seeds
            for kind in arguments.memories
        ]
    with measuring.progress_bar() as bar:
        for name, job in bar.track([one for one in jobs if one[0] not in found], description="memories"):
            # Through JSON, so that what was found now reads as what was kept.
            found[name] = json.loads(json.dumps(job()))
            files.write_text(kept, json.dumps(found, indent=1))
    machine = measuring.machine_info(arguments.device)
    if arguments.plot:
        plot_recall(found, arguments.plot)
    lines = [f"{measuring.format_machine(machine)}.", "", *format_tables(found, arguments)]
    measuring.write_results(arguments, {"figures": found, "machine": machine}, lines)


if __name__ == "__main__":
    main()
