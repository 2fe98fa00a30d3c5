"""Longformer's staged training beside training with the last phase's windows from the start, at equal CPU seconds.

    python scripts/measure_staged.py BOOKS [--seeds 0 1 2] [--seconds 90]

A byte-level causal Longformer (windows of 64 to 256 bytes at last, the last head of the upper layers dilated) on books
in the PG-19 layout. The arms take turns of about two CPU seconds, so that they share the machine's state. "staged":
three phases of 60, 25 and 15% of the time, whose windows and segments double and whose learning rate halves.
"unstaged": the last phase's windows and segments throughout, at the first phase's rate, or with the rate halved at the
same times. The figure is the validation text's bits per byte, read with the last phase's windows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from memtx.data.books import BookDataModule
from memtx.data.streams import DocumentStreams
from memtx.layers.feed_forward import FeedForward
from memtx.models.growing_windows import GrowingWindows, scale_windows
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.optimizers import make_param_groups
from memtx.training.tbptt import unroll

FRACTIONS = (0.6, 0.25, 0.15)
"""Share of the time of each phase."""

TURN_SECONDS = 2.0
WARMUP_STEPS = 50


class Arm(NamedTuple):
    """Factors by phase: of windows and segments, of the learning rate, and the number of streams."""

    windows: tuple[float, ...]
    rates: tuple[float, ...]
    batch_sizes: tuple[int, ...]


ARMS = {
    "staged": Arm((0.25, 0.5, 1.0), (1.0, 0.5, 0.25), (32, 32, 16)),
    "unstaged": Arm((1.0,) * 3, (1.0,) * 3, (16,) * 3),
    "unstaged, rate halved": Arm((1.0,) * 3, (1.0, 0.5, 0.25), (16,) * 3),
}


def train(arm: Arm, data: BookDataModule, seed: int, arguments: argparse.Namespace) -> Iterator[MemoryTransformer]:
    """Train for the seconds of the arguments and yield the model after every turn."""
    torch.manual_seed(seed)
    windows = GrowingWindows([64, 64, 128, 256], dilations=[1, 1, [2], [4]])
    model = MemoryTransformer(
        data.vocab_size, dim=arguments.dim, depth=4, heads=4, memories=windows, feed_forward=partial(FeedForward)
    )
    optimizer = torch.optim.AdamW(make_param_groups(model), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.01)
    memories = copy.deepcopy(model.config["init_args"]["memories"])
    state, phase, seconds, steps = model.init_state(1), -1, 0.0, 0
    streams = DocumentStreams(data.token_store("train"), arm.batch_sizes[0], 1, seed)
    ends = list(itertools.accumulate(FRACTIONS))
    while seconds < arguments.seconds:
        start = time.process_time()
        while (spent := seconds + time.process_time() - start) < arguments.seconds:
            current = next(index for index, end in enumerate(ends) if spent < end * arguments.seconds)
            phase, previous = current, phase
            if previous < 0 or arm.windows[phase] != arm.windows[previous]:
                scale_windows(model, memories, arm.windows[phase])
                streams.resize(arm.batch_sizes[phase], int(256 * arm.windows[phase]))
                state = model.init_state(arm.batch_sizes[phase])
            batch = next(iter(streams))
            rate = arguments.lr * arm.rates[phase] * min(1.0, (steps + 1) / WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = batch.tokens, batch.labels, batch.document_starts
            output = unroll(model, *inputs, state, segment_length=batch.tokens.shape[1])
            output.loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()
            state, steps = output.state, steps + 1
            if time.process_time() - start > TURN_SECONDS:
                break
        seconds += time.process_time() - start
        yield model


def evaluate(model: MemoryTransformer, data: BookDataModule) -> float:
    """Return the bits per byte of the validation text."""
    model.eval()
    total = num_bytes = 0.0
    with torch.inference_mode():
        state = None
        for batch in data.val_dataloader():
            state = model.init_state(batch.tokens.shape[0]) if state is None else state
            inputs = batch.tokens, batch.labels, batch.document_starts
            output = unroll(model, *inputs, state, segment_length=512)
            state, total = output.state, total + float(output.nll.sum())
            num_bytes += float(batch.num_bytes.sum())
    return total / num_bytes / 0.6931471805599453


def main() -> None:
    """Train the arms in turns, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=90.0, help="CPU seconds of each run")
    parser.add_argument("--eval-tokens", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = BookDataModule(
        str(arguments.books), segment_length=512, batch_size=8, eval_tokens=arguments.eval_tokens, num_workers=1
    )
    data.setup()
    results: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in arguments.seeds:
        runs = {name: train(arm, data, seed, arguments) for name, arm in ARMS.items()}
        models: dict[str, MemoryTransformer] = {}
        while runs:
            for name in list(runs):
                if (model := next(runs[name], None)) is None:
                    del runs[name]
                else:
                    models[name] = model
        for name, model in models.items():
            results[name].append(evaluate(model, data))
            print(f"seed {seed}  {name:24} {results[name][-1]:.4f} bits per byte", flush=True)
    print("\n| training | bits per byte, mean | seeds |\n| --- | ---: | --- |")
    for name, figures in results.items():
        print(f"| {name} | {statistics.mean(figures):.3f} | {', '.join(f'{figure:.3f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
