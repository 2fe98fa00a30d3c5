"""Compare what memories gain on books: paired differences between stacks, and of each stack without its memories.

    python scripts/compare_books.py [--root PATH/pg19-mini] [--rows NAME ...] [--seeds 0 1 2] [--tokenizer bpe-2048]
        [--num-parallel 2] [--plot books.png] [--markdown FILE]

Stacks of layers of 128 with equal feed-forward parts learn from configs/pg19-mini.yaml through `memtx fit`: 1,000 steps
of a batch of 16 with 2 segments of 64 tokens. Each reads the first 120 kB of every validation book with its state
carried, with its trained weights at several steps, and with the same weights without one of its sources. Positions and
tokens are told apart: "seen" tokens repeat a pair (previous token, token) of the document that is not among the last 64
tokens, "near" ones one that is, "new" ones none.

Every run is saved in --output-dir as soon as it is measured, so the script can be interrupted and restarted; the tables
show all saved runs of the tokenizer. One thread each; seconds are CPU seconds of the training process, which other
processes on the machine lengthen.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
import yaml
from book_reading import read_run
from book_stacks import COPY_ENTRIES, STACKS, Stack
from book_tables import TABLES, load_runs, plot_differences
from training_runs import config_path, run_fit

from memtx import files

TOKENIZERS: dict[str, dict[str, Any]] = {
    "bytes": {"class_path": "memtx.data.tokenizers.ByteTokenizer"},
    **{
        f"bpe-{size}": {"class_path": "memtx.data.tokenizers.BytePairTokenizer", "init_args": {"vocab_size": size}}
        for size in (2048, 8192)
    },
}
NUM_CHECKPOINTS = 20
CURVE = (0.1, 0.25, 0.5, 0.75)
"""Fractions of the steps at which a run is read, besides the end."""


def write_config(path: Path, stack: Stack, arguments: argparse.Namespace) -> None:
    """Write the config of a run: configs/pg19-mini.yaml with another model, tokenizer and number of steps."""
    config = yaml.safe_load(Path(config_path("pg19-mini")).read_text())
    config["data"] |= {"batch_size": 16, "segment_length": 64, "bptt_segments": 2}
    config["data"]["tokenizer"] = TOKENIZERS[arguments.tokenizer]
    config["model"] |= {"model": stack.model_config(), "measure_memory_gain": False}
    config["model"]["gate_lr_multiplier"] = stack.gate_lr_multiplier
    config["model"]["scheduler"]["init_args"] = {"warmup_steps": min(50, arguments.steps // 4)}
    interval = checkpoint_interval(arguments.steps)
    config["trainer"] |= {
        "max_steps": arguments.steps, "limit_val_batches": 0, "log_every_n_steps": interval,
        "callbacks": [{"class_path": "training_runs.CpuSeconds"}],
    }  # fmt: skip
    del config["trainer"]["val_check_interval"], config["trainer"]["check_val_every_n_epoch"]
    config["checkpoint"] = {"every_n_train_steps": interval, "keep_last": NUM_CHECKPOINTS + 1}
    files.write_text(path, yaml.safe_dump(config))


def checkpoint_interval(steps: int) -> int:
    """Return the number of steps between two checkpoints."""
    return max(1, steps // NUM_CHECKPOINTS)


def curve_steps(steps: int) -> list[int]:
    """Return the steps at which a run is read before its end."""
    interval = checkpoint_interval(steps)
    return sorted({max(interval, int(fraction * steps) // interval * interval) for fraction in CURVE} - {steps})


def measure(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train a stack, or resume its run, and read the books with it."""
    stack, folder = STACKS[name], arguments.output_dir / arguments.tokenizer / f"{name}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "finished").exists():
        config = folder.with_suffix(".yaml")
        write_config(config, stack, arguments)
        seeds = [] if stack.data_seed is None else [f"--data.seed={stack.data_seed}"]
        run_fit(folder, config, arguments.root, seed, seeds)
        files.write_text(folder / "finished", "")
    if not arguments.train_only:
        read_run(folder, arguments.root, curve_steps(arguments.steps), COPY_ENTRIES)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_output_options(parser, plot=True)
    benchmarking.add_data_option(parser, "--root", "pg19-mini", text="books in the PG-19 layout")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare-books"), help="folder of the runs")
    parser.add_argument("--rows", nargs="*", choices=list(STACKS), default=list(STACKS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), default="bpe-2048")
    parser.add_argument("--train-only", action="store_true", help="do not read the books yet")
    benchmarking.add_size_options(parser, steps=1000, num_parallel=1)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    # Seed by seed, so that an interrupted comparison has complete seeds.
    jobs = [(name, seed) for seed in arguments.seeds for name in arguments.rows]
    with benchmarking.progress_bar() as bar, ThreadPoolExecutor(arguments.num_parallel) as pool:
        advance = partial(bar.advance, bar.add_task("books", total=len(jobs)))
        for future in as_completed([pool.submit(measure, *job, arguments) for job in jobs]):
            future.result()
            advance()
    folder = arguments.output_dir / arguments.tokenizer
    runs = load_runs(folder, list(STACKS))
    machine = benchmarking.machine_info(torch.device("cpu"))
    lines = [f"{benchmarking.format_machine(machine)}; {arguments.tokenizer}.", ""]
    for format_table in TABLES:
        lines += format_table(runs)
    if arguments.plot:
        plot_differences(runs, Path(arguments.plot))
    figures = {name: {str(seed): run for seed, run in by_seed.items()} for name, by_seed in runs.items()}
    benchmarking.write_results(arguments, {"runs": figures, "machine": machine}, lines)


if __name__ == "__main__":
    main()
