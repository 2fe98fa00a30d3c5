"""A stream's cost: one-token decoding near and far, and reading in short and in long calls.

    python scripts/bench_stream.py [--json FILE] [--plot PNG] [--markdown FILE]

Decoding, by the decoder that keeps keys and values and by the model's calls of one token: the memory is filled, then
the state's position is set, so that a million tokens need not be read; tokens near and far are timed in turn and
compared round by round. Reading: the same tokens, from a fresh state, in calls of
each length; every length must give the same losses and the same state, and its rate is compared with the first's,
round by round. --plot writes two pictures, the second with "-decoding" in its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Spread, format_mib
from torch import Tensor

from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.malloc import retain_freed_memory
from memtx.state import MemoryState

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""How far losses and states of different cuts may lie apart: the promise in float32, rounding of 8 bits in bf16."""


def measure_decoding(
    model: MemoryTransformer, tokens: Tensor, dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time single tokens at each position, decoded and called.

    Args:
        model: the model.
        tokens: (1, at least what fills the memory) int64.
        dtype: "fp32", or "bf16" for autocast.
        arguments: the command line's.
    """
    device: torch.device = arguments.device
    full = arguments.window + arguments.memory_length * arguments.compression_rate
    with measuring.autocast(device, dtype):
        state = model(tokens[:, :full]).state
        at = {far: MemoryState(torch.full_like(state.position, far), state.layers) for far in arguments.positions}
        decoders = {far: Decoder(model, carried, torch_compile=arguments.compile) for far, carried in at.items()}
        cases = [(by, position) for by in ("decoder", "calls") for position in at]
        times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}

        def decode(by: str, position: int) -> None:
            carried = at[position]
            for place in range(arguments.decode_tokens):
                if by == "calls":
                    carried = model(tokens[:, place : place + 1], carried).state
                else:
                    decoders[position].step(tokens[:, place])

        for case in cases:
            decode(*case)  # warm-up
        for number in range(arguments.rounds):
            # There and back, so that none is always the first.
            for case in cases[:: 1 if number % 2 == 0 else -1]:
                times[case].append(measuring.time_call(partial(decode, *case), device) / arguments.decode_tokens)
    return {
        "dtype": dtype,
        "tokens_per_round": arguments.decode_tokens,
        "state_bytes": state.nbytes,
        "positions": [
            {
                "method": by,
                "position": position,
                "seconds_per_token": dataclasses.asdict(Spread.from_values(taken)),
                "seconds_per_token_by_round": taken,
                "ratio_to_first": statistics.median(
                    own / base for own, base in zip(taken, times[by, arguments.positions[0]], strict=True)
                ),
            }
            for (by, position), taken in times.items()
        ],
    }


def read_in_calls(model: MemoryTransformer, tokens: Tensor, call_length: int) -> tuple[Tensor, MemoryState]:
    """Return (1, length) losses of the next tokens and the last state, read in calls of a length."""
    state, losses = model.init_state(1), []
    for at in range(0, tokens.shape[1] - 1, call_length):
        part = tokens[:, at : at + call_length + 1]
        out = model(part[:, :-1], state, labels=part[:, 1:])
        state = out.state
        losses.append(out.nll)
    return torch.cat(losses, dim=1), state


def max_difference(state: MemoryState, reference: MemoryState) -> float:
    """Return the greatest difference of two states."""
    theirs = reference.named_tensors()
    return max(float((own.double() - theirs[name].double()).abs().max()) for name, own in state.named_tensors().items())


def measure_reading(
    model: MemoryTransformer, tokens: Tensor, dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Read the same tokens in calls of each length: rates, and how far the results lie apart."""
    device: torch.device = arguments.device
    rates: dict[int, list[float]] = {call: [] for call in arguments.call_lengths}
    rows: dict[int, dict[str, Any]] = {}
    count = tokens.shape[1] - 1
    with measuring.autocast(device, dtype):
        losses, state = read_in_calls(model, tokens, arguments.call_lengths[0])
        for call in arguments.call_lengths:
            watched = measuring.reset_peak_memory(device)
            before = measuring.memory_bytes(device)
            own_losses, own_state = read_in_calls(model, tokens, call)
            peak = measuring.peak_memory_bytes(device)
            gap = float((own_losses - losses).abs().max())
            rows[call] = {
                "call_length": call,
                "peak_bytes": max(peak - before, 0) if watched and peak is not None and before is not None else None,
                "state_bytes": own_state.nbytes,
                "loss_difference": gap,
                "state_difference": max_difference(own_state, state),
                "equal": max(gap, max_difference(own_state, state)) <= TOLERANCE[dtype],
            }
        for _ in range(arguments.rounds):
            for call in arguments.call_lengths:
                rates[call].append(count / measuring.time_call(partial(read_in_calls, model, tokens, call), device))
    first = rates[arguments.call_lengths[0]]
    for call, row in rows.items():
        row["tokens_per_second"] = dataclasses.asdict(Spread.from_values(rates[call]))
        row["tokens_per_second_by_round"] = rates[call]
        row["ratio_to_first"] = statistics.median(own / base for own, base in zip(rates[call], first, strict=True))
    return {"dtype": dtype, "tokens": count, "calls": list(rows.values())}


def format_table(results: dict[str, Any]) -> list[str]:
    """Return Markdown."""
    size = results["model"]
    lines = [
        f"{measuring.format_machine(results['machine'])}. dim {size['dim']}, {size['depth']} layers, "
        f"{size['heads']} heads, vocabulary {size['vocab_size']}, window {size['window']}, {size['memory_length']} "
        f"entries of {size['compression_rate']}, one row. "
        f"Medians of {results['rounds']} interleaved rounds, least to greatest in brackets; ratios within a round.",
        "",
        "| one token at position | by | type | us | ratio | state MiB |",
        "|---|---|---|---|---|---|",
    ]
    for one in results["decoding"]:
        for row in one["positions"]:
            low, mid, high = (1e6 * row["seconds_per_token"][which] for which in ("min", "median", "max"))
            lines.append(
                f"| {row['position']:,} | {row['method']} | {one['dtype']} | {mid:,.0f} ({low:,.0f}-{high:,.0f}) | "
                f"{row['ratio_to_first']:.3f} | {format_mib(one['state_bytes'])} |"
            )
    lines += ["", "| reading in calls of | type | tokens/s | ratio | differs by | MiB taken |"]
    lines.append("|---|---|---|---|---|---|")
    for one in results["reading"]:
        for row in one["calls"]:
            low, mid, high = (row["tokens_per_second"][which] for which in ("min", "median", "max"))
            gap = f"{max(row['loss_difference'], row['state_difference']):.0e}{'' if row['equal'] else ', TOO FAR'}"
            lines.append(
                f"| {row['call_length']:,} | {one['dtype']} | {mid:,.0f} ({low:,.0f}-{high:,.0f}) | "
                f"{row['ratio_to_first']:.2f} | {gap} | {format_mib(row['peak_bytes'])} |"
            )
    return lines


def plot_results(path: str, results: dict[str, Any]) -> None:
    """Draw reading rates, and decoding times beside."""
    from memtx import plots

    target = Path(path)
    rates = {
        f"calls of {row['call_length']:,}, {one['dtype']}": row["tokens_per_second_by_round"]
        for one in results["reading"]
        for row in one["calls"]
    }
    plots.plot_seed_comparison(
        target, rates, title="Reading, by tokens a call", unit="tokens per second", lower_is_better=False
    )
    times = {
        f"{row['method']}, position {row['position']:,}, {one['dtype']}": [
            1e3 * taken for taken in row["seconds_per_token_by_round"]
        ]
        for one in results["decoding"]
        for row in one["positions"]
    }
    plots.plot_seed_comparison(
        target.with_stem(f"{target.stem}-decoding"), times, title="One token, by position", unit="ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[2_000, 1_000_000], help="where to decode")
    parser.add_argument("--decode-tokens", type=measuring.positive_int, default=64, help="one-token calls a round")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's step")
    parser.add_argument("--call-lengths", type=int, nargs="+", default=[512, 4096, 32768], help="tokens a call")
    parser.add_argument("--tokens", type=int, default=32768, help="to be read in calls of each length")
    parser.add_argument("--rounds", type=measuring.positive_int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=list(measuring.DTYPES), default=["fp32"])
    sizes = {
        "dim": 256,
        "depth": 6,
        "heads": 4,
        "vocab_size": 8192,
        "window": 512,
        "memory_length": 128,
        "compression_rate": 4,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    measuring.add_benchmark_options(parser)
    arguments = parser.parse_args()
    measuring.apply_benchmark_options(arguments)
    retain_freed_memory()  # as the commands do
    torch.manual_seed(0)
    memory = partial(
        CompressedMemory,
        window=arguments.window,
        compression_rate=arguments.compression_rate,
        num_entries=arguments.memory_length,
    )
    model = MemoryTransformer(arguments.vocab_size, arguments.dim, arguments.depth, arguments.heads, memories=[memory])
    model.to(arguments.device).eval()
    needed = max(
        arguments.tokens,
        arguments.window + arguments.memory_length * arguments.compression_rate,
        arguments.decode_tokens,
    )
    tokens = torch.randint(0, arguments.vocab_size, (1, needed + 1), device=arguments.device)
    decoding, reading = [], []
    with measuring.progress_bar() as bar, torch.inference_mode():
        task = bar.add_task("", total=2 * len(arguments.dtypes))
        for dtype in arguments.dtypes:
            bar.update(task, description=f"decoding {dtype}")
            decoding.append(measure_decoding(model, tokens, dtype, arguments))
            bar.update(task, description=f"reading {dtype}", advance=1)
            reading.append(measure_reading(model, tokens[:, : arguments.tokens + 1], dtype, arguments))
            bar.advance(task)
    results = {
        "machine": measuring.machine_info(arguments.device),
        "model": {name: getattr(arguments, name) for name in sizes},
        "rounds": arguments.rounds,
        "decoding": decoding,
        "reading": reading,
    }
    if arguments.plot:
        plot_results(arguments.plot, results)
    measuring.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    main()
