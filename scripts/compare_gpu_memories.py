"""Compare memories on books at the size of one GPU: bits per byte at equal parameters and tokens.

    scripts/gpu_memory.sh [BOOKS [FOLDER]]          # every step below, each with a time limit
    python scripts/compare_gpu_memories.py plan     # then prepare, train NAME, and tables

`plan` prints what is compared, `prepare` tokenizes the books, `train` trains a stack through `memtx fit` and validates
four times, and `tables` shows all stacks that have been validated, also those that were stopped. Widths of the
feed-forward parts make up for the memories' parameters.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
import yaml
from benchmarking import count_parameters
from compare_memories import match_hidden_dim
from training_runs import config_path, read_metrics, run_fit, run_memtx

from memtx import files, plots
from memtx.class_config import from_config
from memtx.models.memory_transformer import MemoryTransformer

Config = dict[str, Any]
STACKS = {
    "window": "window in all layers",
    "compressed": "3 windows : 1 compressed memory",
    "hybrid": "3 Gated DeltaNets : 1 window",
    "dual": "3 windows : 1 compressed and associative memory",
    "copy": "window in all layers, copy memory",
}
NUM_VALIDATIONS = 4


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of its training; ``window`` is also the length of a segment and of the bank."""

    dim: int
    depth: int
    heads: int
    hidden_dim: int
    vocab_size: int
    window: int
    copy_entries: int
    batch_size: int
    steps: int
    eval_tokens: int

    @property
    def num_tokens(self) -> int:
        """Number of training tokens."""
        return self.steps * self.batch_size * self.window


SIZES = {
    "full": Size(512, 8, 8, 1408, 8192, 512, 6144, 16, 1000, 200_000),
    "tiny": Size(32, 4, 2, 64, 300, 16, 64, 2, 8, 200),
}


def model_config(name: str, size: Size, hidden_dim: int) -> Config:
    """Return the config of a stack; every fourth layer has its memory."""

    def memory(class_path: str, **options: Any) -> Config:
        return {"class_path": class_path, "init_args": options}

    window = memory("memtx.RecurrentMemory", window=size.window)
    rate = {"compression_rate": 4, "num_entries": size.window}
    compressed = memory("memtx.CompressedMemory", window=size.window, **rate, entry_bias=-3.0)
    delta = memory("memtx.memory.gated_delta_net.GatedDeltaNet", heads=size.heads)
    associative = memory("memtx.AssociativeMemory", heads=size.heads)
    most, last = {
        "compressed": (window, compressed), "hybrid": (delta, window), "dual": (window, [compressed, associative]),
    }.get(name, (window, window))  # fmt: skip
    arguments: Config = {
        "dim": size.dim, "depth": size.depth, "heads": size.heads,
        "memories": [most, most, most, last] * (size.depth // 4),
        "feed_forward": memory("memtx.SwiGLU", hidden_dim=hidden_dim),
    }  # fmt: skip
    if name == "copy":
        entries = {"num_entries": size.copy_entries, "train_entries": size.copy_entries // 4}
        arguments["output_memory"] = memory("memtx.CopyMemory", **entries)
    return memory("memtx.MemoryTransformer", **arguments)


def matched_config(name: str, size: Size) -> Config:
    """Return the config of a stack with as many parameters as the window's."""

    def build(hidden_dim: int, stack: str = name) -> MemoryTransformer:
        with torch.device("meta"):
            model: MemoryTransformer = from_config(model_config(stack, size, hidden_dim))(vocab_size=size.vocab_size)
        return model

    return model_config(name, size, match_hidden_dim(build, count_parameters(build(size.hidden_dim, "window"))))


def num_parameters(config: Config, size: Size) -> int:
    """Return the number of parameters of a model."""
    with torch.device("meta"):
        return count_parameters(from_config(config)(vocab_size=size.vocab_size))


def print_plan(size: Size) -> None:
    """Print what is compared."""
    print(
        f"Bits per byte on validation books after {size.num_tokens:,} tokens of BPE {size.vocab_size:,} (batch "
        f"{size.batch_size}, segments of {size.window}, {size.steps:,} steps), at every quarter. Window, bank of "
        f"entries of 4 tokens: {size.window}; copy memory: {size.copy_entries:,}. All stacks against the window."
    )
    for name, title in STACKS.items():
        config = matched_config(name, size)
        hidden_dim = config["init_args"]["feed_forward"]["init_args"]["hidden_dim"]
        print(f"  {name}: {title}; {num_parameters(config, size):,} parameters, feed-forward width {hidden_dim}")


def write_config(path: Path, name: str, size: Size) -> None:
    """Write the config of a run: configs/pg19-mini.yaml with another model and number of steps."""
    config = yaml.safe_load(Path(config_path("pg19-mini")).read_text())
    config["data"] |= {
        "batch_size": size.batch_size, "segment_length": size.window, "eval_batch_size": size.batch_size,
        "eval_tokens": size.eval_tokens, "tokenizer": None,
    }  # fmt: skip
    config["model"] |= {"model": matched_config(name, size), "measure_memory_gain": False}
    config["model"]["optimizer"]["init_args"]["lr"] = 1e-3
    config["model"]["scheduler"]["init_args"] = {"warmup_steps": min(100, size.steps // 4)}
    quarter = size.steps // NUM_VALIDATIONS
    config["trainer"] |= {"max_steps": size.steps, "val_check_interval": quarter, "log_every_n_steps": quarter // 2}
    files.write_text(path, yaml.safe_dump(config))


def prepare(folder: Path, root: Path, size: Size) -> None:
    """Tokenize the books, with a tokenizer that is trained on the training books."""
    options = ("--output-dir", str(folder / "tokens"), "--tokenizer", str(size.vocab_size))
    run_memtx("prepare", *options, str(root), log=folder / "prepare.log")


def train(folder: Path, name: str, size: Size) -> None:
    """Train a stack."""
    config = folder / f"{name}.yaml"
    write_config(config, name, size)
    run_fit(folder / name, config, folder / "tokens", seed=0)


def read_figures(folder: Path, name: str, size: Size) -> dict[str, Any] | None:
    """Return the figures of a stack that has been validated, else None."""
    try:
        rows = read_metrics(folder / name)
    except FileNotFoundError:
        return None
    bits = {int(row["step"]): float(row["val_bits_per_byte"]) for row in rows if row.get("val_bits_per_byte")}
    rates = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    if not bits:
        return None
    return {
        "title": STACKS[name], "parameters": num_parameters(matched_config(name, size), size), "bits_per_byte": bits,
        "tokens_per_second": max(rates, default=None), "is_complete": len(bits) == NUM_VALIDATIONS,
    }  # fmt: skip


def format_table(figures: dict[str, Any], size: Size, machine: dict[str, Any]) -> list[str]:
    """Format bits per byte of all stacks at every validation, and at the end against the window."""
    steps = sorted({step for row in figures.values() for step in row["bits_per_byte"]})
    quarters = [f"after {(index + 1) / NUM_VALIDATIONS:.0%}" for index in range(len(steps))]
    lines = [
        f"{benchmarking.format_machine(machine)}. Bits per byte on validation books; {size.num_tokens:,} tokens.", "",
        f"| stack | parameters | tokens/s | {' | '.join(quarters)} | against the window |",
        "|---" * (len(steps) + 4) + "|",
    ]  # fmt: skip
    base = figures.get("window", {}).get("bits_per_byte", {})
    for name, row in figures.items():
        bits, last = row["bits_per_byte"], steps[-1]
        is_comparable = last in bits and last in base and name != "window"
        difference = f"{bits[last] - base[last]:+.4f}, {bits[last] / base[last] - 1:+.1%}" if is_comparable else ""
        rate = f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""
        cells = [row["title"], f"{row['parameters']:,}", rate]
        cells += [f"{bits[step]:.4f}" if step in bits else "" for step in steps]
        lines.append(f"| {' | '.join([*cells, difference])} |")
    if missing := [title for name, title in STACKS.items() if not figures.get(name, {}).get("is_complete")]:
        lines += ["", f"Not trained to the end: {', '.join(missing)}."]
    return lines


def write_tables(arguments: argparse.Namespace, size: Size) -> None:
    """Write the tables of all stacks that have been validated."""
    figures = {name: row for name in STACKS if (row := read_figures(arguments.output_dir, name, size)) is not None}
    if not figures:
        sys.exit(f"No stack in {arguments.output_dir} has been validated; see the logs beside it.")
    machine = benchmarking.machine_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.plot:
        curves = {row["title"]: (list(bits := row["bits_per_byte"]), list(bits.values())) for row in figures.values()}
        plots.plot_loss_curves(arguments.plot, curves, title="Validation", x_label="steps", y_label="bits per byte")
    results = {"figures": figures, "tokens": size.num_tokens, "machine": machine}
    benchmarking.write_results(arguments, results, format_table(figures, size, machine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("names", "plan", "prepare", "train", "tables"))
    parser.add_argument("name", nargs="?", choices=list(STACKS), help="stack to train")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu-memory/runs"), help="folder of the runs")
    benchmarking.add_data_option(parser, "--root", "pg19-mini", text="books in the PG-19 layout", required=False)
    benchmarking.add_output_options(parser, plot=True)
    arguments = parser.parse_args()
    if {"train": arguments.name, "prepare": arguments.root}.get(arguments.step, "") is None:
        parser.error("train needs a NAME, prepare --root.")
    size, folder = SIZES[arguments.size], arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    {
        "names": partial(print, *STACKS),
        "plan": partial(print_plan, size),
        "prepare": partial(prepare, folder, arguments.root, size),
        "train": partial(train, folder, arguments.name, size),
        "tables": partial(write_tables, arguments, size),
    }[arguments.step]()


if __name__ == "__main__":
    main()
