"""How far back each kind of memory recalls: trained on short episodes, asked ever farther from the pairs.

    python scripts/measure_recall.py [--memories NAME ...] [--seeds 0 1 2] [--steps N] [--distances 3 100 1000 3999]

Pairs of a key and a value in the first of four segments of 24 tokens, questions in the three others, one gradient
through all four; then accuracy where the questions come so many segments after the pairs. Two layers of 64, a window
of one segment beside every memory, so that the window alone is at chance from the second segment on. Seconds are those
of the process on one thread, so that another program's load does not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import measuring
import torch
from learning import train_on_episodes

from memtx import plots
from memtx.data.synthetic_tasks.recall import AssociativeRecall
from memtx.evaluation.accuracy import evaluate_accuracy
from memtx.layers.feed_forward import FeedForward
from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.parts import Gate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.slots import SlotMemory
from memtx.models.memory_transformer import MemoryTransformer

MemoryFactory = Callable[[int], Memory[Any]]

TASK = AssociativeRecall()
WINDOW: MemoryFactory = partial(RecurrentMemory, window=TASK.segment_length)
ASSOCIATIVE: Any = partial(AssociativeMemory, heads=2, decay_gate=None)

MEMORY_STACKS: dict[str, list[MemoryFactory]] = {
    "window": [WINDOW],
    "compressed": [partial(CompressedMemory, window=TASK.segment_length, compression_rate=4, num_entries=36)],
    "associative": [WINDOW, ASSOCIATIVE],
    "associative, a price on writing": [WINDOW, partial(ASSOCIATIVE, write_penalty=0.1)],
    "associative, plain sigmoid": [WINDOW, partial(ASSOCIATIVE, write_gate=partial(Gate, stretch=0.0))],
    "associative, no erasing": [WINDOW, partial(ASSOCIATIVE, delta_rule=False)],
    "slots": [WINDOW, partial(SlotMemory, num_slots=8, interval=TASK.segment_length, heads=2)],
    "retrieval": [WINDOW, partial(RetrievalMemory, capacity=512, top_k=8, exclude_recent=TASK.segment_length, heads=2)],
}


def train_model(
    stack: Sequence[MemoryFactory], seed: int, arguments: argparse.Namespace
) -> tuple[MemoryTransformer, float]:
    """Return a model trained on episodes of four segments, and the seconds that took."""
    torch.manual_seed(seed)
    model = MemoryTransformer(
        TASK.vocab_size, dim=arguments.dim, depth=2, heads=2, memories=[stack], feed_forward=FeedForward
    )
    options = {name: getattr(arguments, name) for name in ("steps", "batch_size", "num_segments", "learning_rate")}
    return model, train_on_episodes(model, TASK, seed=seed, **options)


def format_table(results: Sequence[dict[str, Any]], distances: Sequence[int], machine: dict[str, Any]) -> list[str]:
    """Return the figures as Markdown, a row a kind and seed."""
    lines = [
        f"{measuring.format_machine(machine)}; accuracy by distance in segments, chance {TASK.chance_accuracy:.2f}.",
        "",
        "| memory | seed | " + " | ".join(f"{distance:,}" for distance in distances) + " | s | state bytes |",
        "|---|---|" + "---|" * (len(distances) + 2),
    ]
    for row in results:
        found = " | ".join(f"{row['accuracy'][str(distance)]:.2f}" for distance in distances)
        lines.append(f"| {row['memory']} | {row['seed']} | {found} | {row['seconds']:.0f} | {row['state_bytes']:,} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_benchmark_options(parser)
    parser.add_argument(
        "--memories", nargs="+", choices=list(MEMORY_STACKS), default=list(MEMORY_STACKS), metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", type=measuring.positive_int, default=[3, 100, 1000, 3999])
    for name, default in (("steps", 500), ("batch_size", 32), ("num_segments", 4), ("dim", 64), ("num_samples", 32)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=measuring.positive_int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="the learning rate")
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    results: list[dict[str, Any]] = []
    with measuring.progress_bar() as bar:
        tasks = [(kind, seed) for kind in arguments.memories for seed in arguments.seeds]
        for kind, seed in bar.track(tasks, description="memories"):
            model, spent = train_model(MEMORY_STACKS[kind], seed, arguments)
            shares = {
                str(distance): evaluate_accuracy(
                    model, TASK, distance, num_samples=arguments.num_samples, seed=1000 + seed
                )
                for distance in arguments.distances
            }
            size = model.init_state(1).nbytes
            results.append({"memory": kind, "seed": seed, "accuracy": shares, "seconds": spent, "state_bytes": size})
    machine = measuring.machine_info(arguments.device)
    if arguments.plot:
        curves = {
            f"{row['memory']}, seed {row['seed']}": (arguments.distances, list(row["accuracy"].values()))
            for row in results
        }
        plots.plot_loss_curves(
            arguments.plot, curves, title="Recall", x_label="segments since the pairs", y_label="accuracy"
        )
    found = {"rows": results, "chance": TASK.chance_accuracy, "machine": machine}
    measuring.write_results(arguments, found, format_table(results, arguments.distances, machine))


if __name__ == "__main__":
    main()
