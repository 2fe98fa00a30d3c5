"""Measure memory added to a trained model: texts of 100 windows, and the gain from training the memory alone.

    python scripts/measure_retrofit.py [--root PATH/pg19-mini] [--seeds 0 1 2] [--steps N] [--memory NAME]

A byte-level model learns from pieces of books as long as its window, with full attention. It then reads the first 100
windows of every test book with nothing carried from window to window; with all keys (the first book alone); with the
newest window of keys; also with sinks; and with sinks and a memory, which was trained for a tenth of the steps while
the model was frozen. Hiding the memory separates recall from the effect of the new parameters on any text. With
--lora-rank 8, the last two are repeated with low-rank matrices trained beside the memory, and a control reads with
window, sinks and such matrices alone, trained for as many steps.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import numpy as np
import torch
from memory_stacks import retrofit_stacks
from torch import Tensor

from memtx import plots
from memtx.memory.copy_memory import CopyMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.sources import list_sources, without_source
from memtx.state import MemoryState
from memtx.training import optimizers
from memtx.training.lora import LoRA
from memtx.training.optimizers import WarmupCosine
from memtx.training.tbptt import unroll

BOS_TOKEN_ID = 256
POSITION_RANGES = ((0, 1), (1, 4), (4, 20), (20, 50), (50, 100))
"""Ranges of positions, in windows."""

COPY, COPY_ENTRIES = "copy", 6144
"""The memory of the output, and its positions."""

SIZES = {"steps": 600, "batch_size": 8, "window": 512, "num_windows": 100, "dim": 128, "depth": 4, "num_sinks": 4}


def load_books(root: Path, split: str) -> list[Tensor]:
    """Return the bytes of every book of a split, each after a BOS token."""
    contents = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in sorted((root / split).glob("*.txt"))]
    bos = torch.tensor([BOS_TOKEN_ID])
    return [torch.cat([bos, torch.from_numpy(content.astype(np.int64))]) for content in contents]


def optimizer_step(
    model: MemoryTransformer, optimizer: torch.optim.Optimizer, scheduler: WarmupCosine, loss: Tensor
) -> None:
    """Take one optimizer step."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    scheduler.step()


def build_optimizer(
    model: MemoryTransformer, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, WarmupCosine]:
    """Return AdamW and its schedule; gates have ten times the learning rate, as in LanguageModule."""
    adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = optimizers.build_optimizer(adamw, model, gate_lr_multiplier=10.0)
    return optimizer, WarmupCosine(optimizer, warmup_steps=max(1, steps // 20), total_steps=steps)


def train_base(texts: Sequence[Tensor], seed: int, arguments: argparse.Namespace) -> MemoryTransformer:
    """Train a model on independent pieces of one window each."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    window = arguments.window
    model = MemoryTransformer(
        257, dim=arguments.dim, depth=arguments.depth, heads=4, memories=[partial(RecurrentMemory, window=window)]
    )
    optimizer, scheduler = build_optimizer(model, arguments.learning_rate, arguments.steps)
    lengths = np.array([len(text) for text in texts])
    for _ in range(arguments.steps):
        pieces = []
        for book in rng.choice(len(texts), arguments.batch_size, p=lengths / lengths.sum()):
            start = int(rng.integers(1, len(texts[book]) - window))
            pieces.append(torch.cat([torch.tensor([BOS_TOKEN_ID]), texts[book][start : start + window]]))
        tokens = torch.stack(pieces)
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]).loss
        assert loss is not None
        optimizer_step(model, optimizer, scheduler, loss)
    return model.eval()


def train_on_books(
    model: MemoryTransformer, texts: Sequence[Tensor], seed: int, learning_rate: float, arguments: argparse.Namespace
) -> None:
    """Train all parameters that require a gradient on books read in order, two windows per step, state carried."""
    rng = np.random.default_rng(1000 + seed)
    steps, length = max(1, arguments.steps // 10), 2 * arguments.window
    optimizer, scheduler = build_optimizer(model, learning_rate, steps)
    # Every stream reads one book from its beginning, and starts over at its end.
    books = [texts[book] for book in rng.choice(len(texts), arguments.batch_size, replace=False)]
    state = model.train().init_state(arguments.batch_size)
    for step in range(steps):
        pieces, document_starts = [], torch.zeros(arguments.batch_size, length, dtype=torch.bool)
        for stream, book in enumerate(books):
            start = step * length % (len(book) - length - 1)
            document_starts[stream, 0] = start < length
            pieces.append(book[start : start + length + 1])
        tokens = torch.stack(pieces)
        out = unroll(model, tokens[:, :-1], tokens[:, 1:], document_starts, state, segment_length=arguments.window)
        state = out.state
        optimizer_step(model, optimizer, scheduler, out.loss)
    model.eval()


CarryFn = Callable[[MemoryTransformer, MemoryState], MemoryState | None]


def carry_all(model: MemoryTransformer, state: MemoryState) -> MemoryState:
    """Carry the whole state from window to window."""
    return state


def carry_nothing(model: MemoryTransformer, state: MemoryState) -> None:
    """Carry nothing from window to window."""


def hide_memory(model: MemoryTransformer) -> MemoryTransformer:
    """Return a copy that never reads the added memory: what remains is the effect of new parameters on any text."""
    for source in list_sources(model):
        model = model if source == "sink" else without_source(model, source)
    return model


@torch.no_grad()
def read_by_window(model: MemoryTransformer, tokens: Tensor, window: int, carry_fn: CarryFn) -> dict[str, Any]:
    """Read tokens (batch, length + 1) window by window; return bits of every byte, state size, memory and seconds."""
    device, state = torch.device("cpu"), None
    bits, sizes = [], []
    benchmarking.reset_peak_memory(device)
    before, start_time = benchmarking.memory_bytes(device) or 0, time.process_time()
    for start in range(0, tokens.shape[1] - 1, window):
        segment = tokens[:, start : start + window + 1]
        out = model(segment[:, :-1], state, labels=segment[:, 1:])
        assert out.nll is not None
        bits.append(out.nll / math.log(2.0))
        sizes.append(out.state.nbytes / tokens.shape[0])
        state = carry_fn(model, out.state)
    return {
        "bits": torch.cat(bits, dim=1).double().mean(0),
        "state_bytes": sizes[-1] if carry_fn is not carry_nothing else 0.0,
        "memory_growth_bytes": max(0, (benchmarking.peak_memory_bytes(device) or 0) - before),
        "seconds": time.process_time() - start_time,
    }


def retrofit(
    base: MemoryTransformer, train: Sequence[Tensor], seed: int, arguments: argparse.Namespace, memory: Any, rank: int
) -> MemoryTransformer:
    """Add a memory, low-rank matrices or both to the frozen base, train them, and return the model."""
    torch.manual_seed(seed)
    output_memory = partial(CopyMemory, num_entries=COPY_ENTRIES) if memory == COPY else None
    memory = () if memory == COPY else memory
    # A log-weight begins nearly closed by itself.
    is_gated = not any(factory.keywords.get("entry_bias") for factory in memory)
    options = {"num_sinks": arguments.num_sinks, "output_memory": output_memory, "gated_memory": is_gated}
    model = base.with_memory(memory, **options)
    added = model.memory_parameters()
    if rank:
        added = {**added, **LoRA(rank, 2 * rank)(model)}
    trainable = {id(parameter) for parameter in added.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    train_on_books(model, train, seed, arguments.memory_learning_rate, arguments)
    # Saving merges the matrices.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return MemoryTransformer.from_pretrained(folder)


def build_variants(seed: int, train: Sequence[Tensor], arguments: argparse.Namespace) -> dict[str, tuple[Any, CarryFn]]:
    """Return the variants by name: a model and the function that carries its state from window to window."""
    window, rank = arguments.window, arguments.lora_rank
    base = train_base(train, seed, arguments)
    memory = COPY if arguments.memory == COPY else retrofit_stacks(window)[arguments.memory]
    model = retrofit(base, train, seed, arguments, memory, 0)
    variants: dict[str, tuple[Any, CarryFn]] = {
        "nothing carried": (base, carry_nothing),
        "window": (base, carry_all),
        "window and sinks": (base.with_memory(num_sinks=arguments.num_sinks), carry_all),
        "window, sinks and memory": (model, carry_all),
        "memory hidden": (hide_memory(model), carry_all),
    }
    if rank:
        with_lora = retrofit(base, train, seed, arguments, memory, rank)
        variants["window, sinks, memory and LoRA"] = (with_lora, carry_all)
        variants["memory and LoRA, memory hidden"] = (hide_memory(with_lora), carry_all)
        variants["window, sinks and LoRA"] = (retrofit(base, train, seed, arguments, (), rank), carry_all)
    if seed == arguments.seeds[0]:
        variants["all keys"] = (base.without_memory(window * arguments.num_windows), carry_all)
    return variants


def format_table(
    results: Sequence[dict[str, Any]], arguments: argparse.Namespace, machine: dict[str, Any]
) -> list[str]:
    """Format the figures as Markdown, a line for each variant and seed."""
    ranges = [f"{low}-{high}" for low, high in POSITION_RANGES if high <= arguments.num_windows]
    lines = [
        f"{benchmarking.format_machine(machine)}; bits per byte by position in windows of {arguments.window} bytes.",
        "",
        f"| variant | seed | {' | '.join(ranges)} | beyond the window | state per stream, MiB | s |",
        "|---" * (len(ranges) + 5) + "|",
    ]
    for row in results:
        bits = " | ".join(f"{value:.3f}" for value in row["ranges"])
        size = row["state_bytes"] / benchmarking.MIB
        lines.append(
            f"| {row['variant']} | {row['seed']} | {bits} | {row['beyond_window']:.3f} | {size:.2f} | "
            f"{row['seconds']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_benchmark_options(parser)
    benchmarking.add_data_option(parser, "--root", "pg19-mini", text="a folder with train/ and test/ of .txt files")
    parser.add_argument("--memory", choices=[COPY, *retrofit_stacks(4)], default=COPY)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    benchmarking.add_size_options(parser, **SIZES)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="learning rate of the base model")
    parser.add_argument(
        "--memory-learning-rate", type=float, default=5e-3, help="learning rate of the added parameters"
    )
    parser.add_argument("--lora-rank", type=benchmarking.positive_int, help="add three variants with LoRA of this rank")
    arguments = parser.parse_args()
    benchmarking.apply_benchmark_options(arguments)
    train, test = (load_books(arguments.root, split) for split in ("train", "test"))
    num_windows, length = arguments.num_windows, arguments.window * arguments.num_windows
    tokens = torch.stack([text[: length + 1] for text in test])
    results: list[dict[str, Any]] = []
    curves = {}
    with benchmarking.progress_bar() as bar:
        for seed in bar.track(arguments.seeds, description="seeds"):
            for variant, (model, carry_fn) in build_variants(seed, train, arguments).items():
                texts = tokens[:1] if variant == "all keys" else tokens
                figures = read_by_window(model, texts, arguments.window, carry_fn)
                by_window = figures.pop("bits").view(num_windows, arguments.window).mean(1)
                ranges = [by_window[low:high].mean().item() for low, high in POSITION_RANGES if high <= num_windows]
                beyond = by_window[1:].mean().item()
                results.append({"variant": variant, "seed": seed, "ranges": ranges, "beyond_window": beyond, **figures})
                if seed == arguments.seeds[0]:
                    curves[variant] = (list(range(1, num_windows + 1)), by_window.tolist())
    machine = benchmarking.machine_info(arguments.device)
    if arguments.plot:
        title = f"A text of {num_windows} windows"
        plots.plot_loss_curves(arguments.plot, curves, title=title, x_label="windows read", y_label="bits per byte")
    benchmarking.write_results(
        arguments, {"rows": results, "machine": machine}, format_table(results, arguments, machine)
    )


if __name__ == "__main__":
    main()
