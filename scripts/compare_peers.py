"""Compare language models on books with those of other libraries, at equal CPU seconds and about equal parameters.

    python scripts/compare_peers.py [--root PATH/pg19-mini] [--systems NAME ...] [--seeds 0 1 2] [--cpu-seconds 150]
        [--num-parallel 2] [--plot peers.png] [--markdown FILE]

All learn from the same batches in the same order (16 rows, 2 calls of 64 tokens, a BPE of 2,048) with AdamW, a cosine
over the seconds, bfloat16 autocast, and one thread; they carry what they keep from batch to batch. A system sees as
many batches as it gets through. The first 120 kB of every validation book are read with the state carried, at thirds
of the time; reading is not counted.

Every run is saved in --output-dir, so the script can be interrupted and restarted. Other processes on the machine
lengthen CPU seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from book_peers import BPTT_SEGMENTS, PEERS, SEGMENT_LENGTH, Read
from book_reading import Book, load_books, read_side_by_side
from book_tables import format_table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx import files, plots
from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.books import BookDataModule
from memtx.data.tokenizers import BytePairTokenizer
from memtx.ops.cpu.malloc import retain_freed_memory

NUM_READINGS = 3
WARMUP = 0.05
"""Fraction of the time in which the learning rate grows."""
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


def iter_batches(data: BookDataModule) -> Iterator[Batch]:
    """Yield training batches without end."""
    while True:
        yield from data.train_dataloader()


def create_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices alone."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def train_step(
    model: nn.Module, read: Read, batch: Batch, state: Any, optimizer: torch.optim.Optimizer
) -> tuple[float, Any]:
    """Learn from a batch and return its mean loss in nats and the state."""
    total: Any = 0.0
    with AUTOCAST():
        for segment in zip(*(torch.split(part, SEGMENT_LENGTH, dim=1) for part in batch[:3]), strict=True):
            tokens, labels, document_starts = segment
            segment_total, _, state = read(tokens, labels, document_starts, state)
            total = total + segment_total
    loss = total / (batch.labels != IGNORE_INDEX).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), pytree.tree_map_only(Tensor, Tensor.detach, state)


def measure_bits(model: nn.Module, read: Read, books: Sequence[Book]) -> list[float]:
    """Return the bits per byte of the books."""

    def read_segment(tokens: Tensor, labels: Tensor, state: Any) -> tuple[Tensor, Any]:
        _, nats, state = read(tokens, labels, torch.zeros_like(tokens, dtype=torch.bool), state)
        return nats, pytree.tree_map_only(Tensor, Tensor.detach, state)

    model.eval()
    streams = read_side_by_side(read_segment, books, SEGMENT_LENGTH)
    model.train()
    nats = [float(stream.sum(dtype="float64")) for stream in streams]
    return [value / math.log(2) / book.num_bytes for value, book in zip(nats, books, strict=True)]


def measure(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a system for the given time and return its figures."""
    torch.set_num_threads(1)
    retain_freed_memory(include_large_blocks=True)
    data = BookDataModule(
        str(arguments.root), BytePairTokenizer(2048), batch_size=16, segment_length=SEGMENT_LENGTH,
        bptt_segments=BPTT_SEGMENTS, seed=seed, num_workers=1,
    )  # fmt: skip
    data.setup("fit")
    torch.manual_seed(seed)
    peer = PEERS[name]
    model, read = peer.build(data.vocab_size)
    optimizer = create_optimizer(model, peer.learning_rate)
    batches, books = iter_batches(data), load_books(arguments.root, data.tokenizer)
    state, seconds = None, 0.0
    readings: list[dict[str, Any]] = []
    for step in itertools.count(1):
        progress = seconds / arguments.cpu_seconds
        scale = min(1.0, (progress + 0.01 * WARMUP) / WARMUP) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peer.learning_rate * scale
        batch = next(batches)
        start = time.process_time()
        _, state = train_step(model, read, batch, state, optimizer)
        seconds += time.process_time() - start
        if seconds >= arguments.cpu_seconds * (len(readings) + 1) / NUM_READINGS:
            bits = measure_bits(model, read, books)
            readings.append({"seconds": seconds, "step": step, "bits_per_byte": bits})
        if len(readings) == NUM_READINGS:
            break
    return {"system": name, "seed": seed, "parameters": benchmarking.count_parameters(model), "readings": readings}


def final_bits(run: dict[str, Any]) -> float:
    """Return a run's bits per byte in the end, the mean over books."""
    return statistics.fmean(run["readings"][-1]["bits_per_byte"])


def format_results(runs: list[dict[str, Any]], seconds: float) -> list[str]:
    """Format the results as Markdown, the best system first."""
    rows = []
    for name in {run["system"]: None for run in runs}:
        mine = [run for run in runs if run["system"] == name]
        steps = statistics.fmean(run["readings"][-1]["step"] for run in mine)
        bits = [f"{final_bits(run):.4f}" for run in mine]
        mean = statistics.fmean(map(final_bits, mine))
        rows.append((mean, [name, f"{mine[0]['parameters']:,}", f"{steps:,.0f}", ", ".join(bits), f"{mean:.4f}"]))
    header = ["system", "parameters", "batches", "bits per byte by seed", "mean"]
    return [f"After {seconds:g} CPU seconds:", "", *format_table(header, [row for _, row in sorted(rows)])]


def plot_curves(path: Path, runs: list[dict[str, Any]]) -> None:
    """Plot bits per byte over CPU seconds, the mean over seeds."""
    curves = {}
    for name in {run["system"]: None for run in sorted(runs, key=final_bits)}:
        readings = [run["readings"] for run in runs if run["system"] == name]
        curves[name] = (
            [statistics.fmean(reading["seconds"] for reading in point) for point in zip(*readings, strict=True)],
            [statistics.fmean(itertools.chain(*(reading["bits_per_byte"] for reading in point)))
             for point in zip(*readings, strict=True)],
        )  # fmt: skip
    plots.plot_loss_curves(
        path, curves, title="Validation books, mean of the seeds", x_label="CPU seconds", y_label="bits per byte"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_output_options(parser, plot=True)
    benchmarking.add_data_option(parser, "--root", "pg19-mini", text="books in the PG-19 layout")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-peers"), help="folder of the results")
    parser.add_argument("--systems", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cpu-seconds", type=float, default=150.0)
    benchmarking.add_size_options(parser, num_parallel=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that an interrupted comparison has complete seeds.
    jobs = [(name, seed) for seed in arguments.seeds for name in arguments.systems]
    paths = {
        job: arguments.output_dir / f"{job[0].replace(' ', '-')}-{job[1]}-{arguments.cpu_seconds:g}.json"
        for job in jobs
    }
    missing = [job for job in jobs if not paths[job].exists()]
    with benchmarking.progress_bar() as bar, ProcessPoolExecutor(arguments.num_parallel) as pool:
        task = bar.add_task("systems", total=len(missing))
        futures = {pool.submit(measure, *job, arguments): job for job in missing}
        for future in as_completed(futures):
            try:
                files.write_text(paths[futures[future]], json.dumps(future.result()))
            except ModuleNotFoundError as error:
                name = futures[future][0]
                bar.console.print(f"{name}: {error}; left out. pip install --no-deps {PEERS[name].packages}")
            bar.advance(task)
    runs = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
    machine = benchmarking.machine_info(torch.device("cpu"))
    lines = [benchmarking.format_machine(machine), "", *format_results(runs, arguments.cpu_seconds)]
    if arguments.plot:
        plot_curves(Path(arguments.plot), runs)
    benchmarking.write_results(arguments, {"runs": runs, "machine": machine}, lines)


if __name__ == "__main__":
    main()
