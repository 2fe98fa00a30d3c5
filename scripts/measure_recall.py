"""How far back each kind of memory recalls: trained on short episodes, asked ever farther from the pairs.

    python scripts/measure_recall.py [--kinds NAME ...] [--seeds 0 1 2] [--steps N] [--distances 3 100 1000 3999]

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
from learning import learned

from memtx import plots
from memtx.data.episodes.recall import Recall
from memtx.evaluation.accuracy import accuracy
from memtx.layers.feed_forward import FeedForward
from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.gates import Gate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.slots import SlotMemory
from memtx.models.memory_transformer import MemoryTransformer

Make = Callable[[int], Memory[Any]]

TASK = Recall()
WINDOW: Make = partial(RecurrentMemory, window=TASK.segment)
ASSOCIATIVE: Any = partial(AssociativeMemory, heads=2, decay=None)

KINDS: dict[str, list[Make]] = {
    "window": [WINDOW],
    "compressed": [partial(CompressedMemory, window=TASK.segment, rate=4, length=36)],
    "associative": [WINDOW, ASSOCIATIVE],
    "associative, a price on writing": [WINDOW, partial(ASSOCIATIVE, cost=0.1)],
    "associative, plain sigmoid": [WINDOW, partial(ASSOCIATIVE, write=partial(Gate, stretch=0.0))],
    "associative, no erasing": [WINDOW, partial(ASSOCIATIVE, erase=False)],
    "slots": [WINDOW, partial(SlotMemory, count=8, interval=TASK.segment, heads=2)],
    "retrieval": [WINDOW, partial(RetrievalMemory, capacity=512, nearest=8, skip=TASK.segment, heads=2)],
}


def trained(stack: Sequence[Make], seed: int, arguments: argparse.Namespace) -> tuple[MemoryTransformer, float]:
    """Return a model trained on episodes of four segments, and the seconds that took."""
    torch.manual_seed(seed)
    model = MemoryTransformer(
        TASK.vocab_size, dim=arguments.dim, depth=2, heads=2, memories=[stack], feed_forward=FeedForward
    )
    options = {name: getattr(arguments, name) for name in ("steps", "rows", "segments", "rate")}
    return model, learned(model, TASK, seed=seed, **options)


def table(results: Sequence[dict[str, Any]], distances: Sequence[int], machine: dict[str, Any]) -> list[str]:
    """Return the figures as Markdown, a row a kind and seed."""
    lines = [
        f"{measuring.headline(machine)}; accuracy by distance in segments, chance {TASK.chance:.2f}.",
        "",
        "| memory | seed | " + " | ".join(f"{distance:,}" for distance in distances) + " | s | state bytes |",
        "|---|---|" + "---|" * (len(distances) + 2),
    ]
    for row in results:
        found = " | ".join(f"{row['accuracy'][str(distance)]:.2f}" for distance in distances)
        lines.append(f"| {row['kind']} | {row['seed']} | {found} | {row['seconds']:.0f} | {row['state_bytes']:,} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_options(parser)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distances", nargs="+", type=measuring.positive, default=[3, 100, 1000, 3999])
    for name, default in (("steps", 500), ("rows", 32), ("segments", 4), ("dim", 64), ("episodes", 32)):
        parser.add_argument(f"--{name}", type=measuring.positive, default=default)
    parser.add_argument("--rate", type=float, default=2e-3, help="the learning rate")
    arguments = parser.parse_args()
    measuring.prepare(arguments)
    results: list[dict[str, Any]] = []
    with measuring.progress() as bar:
        tasks = [(kind, seed) for kind in arguments.kinds for seed in arguments.seeds]
        for kind, seed in bar.track(tasks, description="memories"):
            model, spent = trained(KINDS[kind], seed, arguments)
            shares = {
                str(distance): accuracy(model, TASK, distance, rows=arguments.episodes, seed=1000 + seed)
                for distance in arguments.distances
            }
            size = model.init_state(1).nbytes
            results.append({"kind": kind, "seed": seed, "accuracy": shares, "seconds": spent, "state_bytes": size})
    machine = measuring.machine(arguments.device)
    if arguments.plot:
        curves = {
            f"{row['kind']}, seed {row['seed']}": (arguments.distances, list(row["accuracy"].values()))
            for row in results
        }
        plots.loss_curve(arguments.plot, curves, title="Recall", x="segments since the pairs", y="accuracy")
    found = {"rows": results, "chance": TASK.chance, "machine": machine}
    measuring.deliver(arguments, found, table(results, arguments.distances, machine))


if __name__ == "__main__":
    main()
