"""Memory for a model that is already trained: a text 100 times the window, and what training the memory alone is worth.

    python scripts/measure_retrofit.py --root PATH/pg19-mini [--seeds 0 1 2] [--steps N] [--memory associative]

A byte-level model learns from whole books cut into pieces as long as its window, all of a piece in sight. Then it reads
the first 100 windows of every test book in five ways: cut off at every window, with all keys kept (the first book
alone), with the newest window of keys, with sinks beside these, and with a memory as well that was trained for a tenth
of the steps while the model stayed as it was. One more row, the same with what the memory holds forgotten at every
window, tells what is remembered from what the new parameters do for any text. With --lora-rank 8, the same two of a
memory trained with low-rank matrices of that rank beside it, and the control: the window and sinks, with such matrices
alone trained for as many steps.
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

import measuring
import numpy as np
import torch
from torch import Tensor

from memtx import plots
from memtx.memory.associative import AssociativeMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.sinks import SinkMemory
from memtx.memory.slots import SlotMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState
from memtx.training.lora import LoRA
from memtx.training.optimizers import WarmupCosine, make_param_groups
from memtx.training.tbptt import unroll

BOS_TOKEN_ID = 256
POSITION_RANGES = ((0, 1), (1, 4), (4, 20), (20, 50), (50, 100))
"""Of positions, in windows."""


def memory_stacks(window: int) -> dict[str, list[Any]]:
    """Return what can be added."""
    return {
        "associative": [partial(AssociativeMemory, heads=4, decay_gate=None)],
        "compressed": [partial(CompressedMemory, window=window, compression_rate=4, num_entries=window // 2)],
        "slots": [partial(SlotMemory, num_slots=16, interval=window // 4)],
    }


def load_books(root: Path, split: str) -> list[Tensor]:
    """Return every book of a split as bytes with BOS_TOKEN_ID before them."""
    found = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in sorted((root / split).glob("*.txt"))]
    return [torch.cat([torch.tensor([BOS_TOKEN_ID]), torch.from_numpy(one.astype(np.int64))]) for one in found]


def optimizer_step(
    model: MemoryTransformer, optimizer: torch.optim.Optimizer, scheduler: WarmupCosine, loss: Tensor
) -> None:
    """Learn from a loss."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([one for one in model.parameters() if one.requires_grad], 1.0)
    optimizer.step()
    scheduler.step()


def build_optimizer(
    model: MemoryTransformer, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, WarmupCosine]:
    """Return the optimiser and its schedule."""
    optimizer = torch.optim.AdamW(make_param_groups(model), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    return optimizer, WarmupCosine(optimizer, warmup_steps=max(1, steps // 20), total_steps=steps)


def train_base(texts: Sequence[Tensor], seed: int, arguments: argparse.Namespace) -> MemoryTransformer:
    """Train on pieces of one window, each fresh, all of it in sight."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    window = arguments.window
    model = MemoryTransformer(
        257, dim=arguments.dim, depth=arguments.depth, heads=4, memories=[partial(RecurrentMemory, window=window)]
    )
    optimizer, schedule = build_optimizer(model, arguments.learning_rate, arguments.steps)
    share = np.array([len(text) for text in texts]) / sum(len(text) for text in texts)
    for _ in range(arguments.steps):
        pieces = []
        for book in draw.choice(len(texts), arguments.batch_size, p=share):
            at = int(draw.integers(1, len(texts[book]) - window))
            pieces.append(torch.cat([torch.tensor([BOS_TOKEN_ID]), texts[book][at : at + window]]))
        tokens = torch.stack(pieces)
        loss = model(tokens[:, :-1], labels=tokens[:, 1:]).loss
        assert loss is not None
        optimizer_step(model, optimizer, schedule, loss)
    return model.eval()


def train_on_books(
    model: MemoryTransformer, texts: Sequence[Tensor], seed: int, learning_rate: float, arguments: argparse.Namespace
) -> None:
    """Train what asks for a gradient on whole books read in order, two windows a step, the state carried."""
    draw = np.random.default_rng(1000 + seed)
    steps, n = max(1, arguments.steps // 10), 2 * arguments.window
    optimizer, schedule = build_optimizer(model, learning_rate, steps)
    # Every row is one book from its beginning, as far as the steps go, and begins anew where it ends.
    rows = [texts[book] for book in draw.choice(len(texts), arguments.batch_size, replace=False)]
    state = model.train().init_state(arguments.batch_size)
    for number in range(steps):
        given, starts = [], torch.zeros(arguments.batch_size, n, dtype=torch.bool)
        for row, text in enumerate(rows):
            at = number * n % (len(text) - n - 1)
            starts[row, 0] = at < n
            given.append(text[at : at + n + 1])
        tokens = torch.stack(given)
        out = unroll(model, tokens[:, :-1], tokens[:, 1:], starts, state, segment_length=arguments.window)
        state = out.state
        optimizer_step(model, optimizer, schedule, out.loss)
    model.eval()


CarryFn = Callable[[MemoryTransformer, MemoryState], MemoryState | None]


def carry_all(model: MemoryTransformer, state: MemoryState) -> MemoryState:
    """Carry everything from window to window."""
    return state


def carry_nothing(model: MemoryTransformer, state: MemoryState) -> None:
    """Carry nothing: the text is cut off."""


def carry_exact(model: MemoryTransformer, state: MemoryState) -> MemoryState:
    """Carry the exact states and the sinks, and clear every other memory."""
    fresh = model.init_state(state.batch_size)
    layers = []
    for block, own, empty in zip(model.blocks, state.layers, fresh.layers, strict=True):
        pairs = zip(block.attention.memories, own, empty, strict=True)  # type: ignore[union-attr, arg-type]
        layers.append(
            tuple(
                mine
                if isinstance(memory, RecurrentMemory | SinkMemory)
                else none
                if not isinstance(memory, CompressedMemory)
                else type(mine)(mine.hidden, none.bank)
                for memory, mine, none in pairs
            )
        )
    return MemoryState(state.position, tuple(layers))


@torch.no_grad()
def read_by_window(model: MemoryTransformer, tokens: Tensor, window: int, carry_fn: CarryFn) -> dict[str, Any]:
    """Read (rows, n + 1) tokens window by window; return bits of every byte, what is held, and the seconds."""
    device, state = torch.device("cpu"), None
    bits, sizes = [], []
    measuring.reset_peak_memory(device)
    before, began = measuring.memory_bytes(device) or 0, time.process_time()
    for at in range(0, tokens.shape[1] - 1, window):
        part = tokens[:, at : at + window + 1]
        out = model(part[:, :-1], state, labels=part[:, 1:])
        assert out.nll is not None
        bits.append(out.nll / math.log(2.0))
        sizes.append(out.state.nbytes / tokens.shape[0])
        state = carry_fn(model, out.state)
    return {
        "bits": torch.cat(bits, dim=1).double().mean(0),
        "state_bytes": sizes[-1] if carry_fn is not carry_nothing else 0.0,
        "memory_growth_bytes": max(0, (measuring.peak_memory_bytes(device) or 0) - before),
        "seconds": time.process_time() - began,
    }


def retrofit(
    base: MemoryTransformer, train: Sequence[Tensor], seed: int, arguments: argparse.Namespace, memory: Any, rank: int
) -> MemoryTransformer:
    """Return the base with what learned while it stayed as it was: a memory, low-rank matrices, or both."""
    made = base.with_memory(memory, num_sinks=arguments.num_sinks)
    learning = made.memory_parameters()
    if rank:
        torch.manual_seed(seed)
        learning = {**learning, **LoRA(rank, 2 * rank)(made)}
    added = {id(one) for one in learning.values()}
    for one in made.parameters():
        one.requires_grad_(id(one) in added)
    train_on_books(made, train, seed, arguments.memory_learning_rate, arguments)
    # Read as it is kept: with the matrices merged.
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return MemoryTransformer.from_pretrained(folder)


def build_variants(seed: int, train: Sequence[Tensor], arguments: argparse.Namespace) -> dict[str, tuple[Any, CarryFn]]:
    """Return the ways of reading: a model, and what it carries from window to window."""
    window, rank = arguments.window, arguments.lora_rank
    base = train_base(train, seed, arguments)
    memory = memory_stacks(window)[arguments.memory]
    made = retrofit(base, train, seed, arguments, memory, 0)
    found: dict[str, tuple[Any, CarryFn]] = {
        "cut off at every window": (base, carry_nothing),
        "the newest window of keys": (base, carry_all),
        "window and sinks": (base.with_memory(num_sinks=arguments.num_sinks), carry_all),
        "window, sinks and memory": (made, carry_all),
        "memory forgotten at every window": (made, carry_exact),
    }
    if rank:
        both = retrofit(base, train, seed, arguments, memory, rank)
        found["window, sinks, memory and LoRA"] = (both, carry_all)
        found["memory and LoRA, memory forgotten at every window"] = (both, carry_exact)
        found["window, sinks and LoRA alone"] = (retrofit(base, train, seed, arguments, (), rank), carry_all)
    if seed == arguments.seeds[0]:
        found["all keys"] = (base.without_memory(window * arguments.num_windows), carry_all)
    return found


def format_table(
    results: Sequence[dict[str, Any]], arguments: argparse.Namespace, machine: dict[str, Any]
) -> list[str]:
    """Return the figures as Markdown, a row a way and seed."""
    lines = [
        f"{measuring.format_machine(machine)}; bits per byte by position in windows of {arguments.window} bytes.",
        "",
        "| read with | seed | "
        + " | ".join(f"{low}-{high}" for low, high in POSITION_RANGES if high <= arguments.num_windows)
        + " | beyond the window | state a row, MiB | s |",
        "|---|---|" + "---|" * (sum(high <= arguments.num_windows for _, high in POSITION_RANGES) + 3),
    ]
    for row in results:
        found = " | ".join(f"{value:.3f}" for value in row["ranges"])
        size = row["state_bytes"] / measuring.MIB
        lines.append(
            f"| {row['variant']} | {row['seed']} | {found} | {row['beyond_window']:.3f} | {size:.2f} | "
            f"{row['seconds']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_benchmark_options(parser)
    parser.add_argument("--root", type=Path, required=True, help="a folder with train/ and test/ of <id>.txt")
    parser.add_argument("--memory", choices=list(memory_stacks(4)), default="associative")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    numbers = {"steps": 600, "batch_size": 8, "window": 512, "num_windows": 100, "dim": 128, "depth": 4, "num_sinks": 4}
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=measuring.positive_int, default=default)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the learning rate")
    parser.add_argument("--memory-learning-rate", type=float, default=5e-3, help="that of what is added")
    parser.add_argument(
        "--lora-rank", type=measuring.positive_int, help="the rank of low-rank matrices in three more rows"
    )
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    train, test = (load_books(arguments.root, split) for split in ("train", "test"))
    n = arguments.window * arguments.num_windows
    tokens = torch.stack([text[: n + 1] for text in test])
    results: list[dict[str, Any]] = []
    curves = {}
    with measuring.progress_bar() as bar:
        for seed in bar.track(arguments.seeds, description="seeds"):
            for way, (model, between) in build_variants(seed, train, arguments).items():
                found = read_by_window(model, tokens[:1] if way == "all keys" else tokens, arguments.window, between)
                by_window = found.pop("bits").view(arguments.num_windows, arguments.window).mean(1)
                ranges = [
                    by_window[low:high].mean().item() for low, high in POSITION_RANGES if high <= arguments.num_windows
                ]
                results.append(
                    {
                        "variant": way,
                        "seed": seed,
                        "ranges": ranges,
                        "beyond_window": by_window[1:].mean().item(),
                        **found,
                    }
                )
                if seed == arguments.seeds[0]:
                    curves[way] = (list(range(1, arguments.num_windows + 1)), by_window.tolist())
    machine = measuring.machine_info(arguments.device)
    if arguments.plot:
        title = f"A text {arguments.num_windows} times the window"
        plots.plot_loss_curves(arguments.plot, curves, title=title, x_label="windows read", y_label="bits per byte")
    measuring.write_results(arguments, {"rows": results, "machine": machine}, format_table(results, arguments, machine))


if __name__ == "__main__":
    main()
