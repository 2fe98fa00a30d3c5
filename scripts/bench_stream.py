"""Benchmark a long stream: single tokens at near and far positions, and reading in short and long calls.

    python scripts/bench_stream.py [--json FILE] [--plot PNG] [--markdown FILE]

Single tokens, by the decoder that carries keys and values and by calls of the model: the memory is filled and the
state's position is then set, so that a million tokens need not be read; near and far tokens alternate and are compared
within a round. Reading: the same tokens from a fresh state in calls of each length; every length must give the same
losses and state, and its rate is compared with that of the first length within a round. --plot writes two pictures, the
second with "-decoding" in its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import Spread, format_mib
from torch import Tensor

from memtx.inference.decoder import Decoder
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.malloc import retain_freed_memory
from memtx.state import MemoryState

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Maximum difference of losses and states between call lengths: the guarantee in float32, rounding errors in bf16."""


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(value / reference for value, reference in zip(values, base, strict=True))


def measure_decoding(
    model: MemoryTransformer, tokens: Tensor, dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Time single tokens at each position, by the decoder and by calls of the model.

    Args:
        model: The model.
        tokens: (1, length) int64, at least as many as fill the memory.
        dtype: "fp32", or "bf16" for autocast.
        arguments: Parsed command line.
    """
    device: torch.device = arguments.device
    span = arguments.window + arguments.memory_length * arguments.compression_rate
    with benchmarking.autocast(device, dtype):
        state = model(tokens[:, :span]).state
        states = {
            position: MemoryState(torch.full_like(state.position, position), state.layers)
            for position in arguments.positions
        }
        decoders = {key: Decoder(model, value, torch_compile=arguments.compile) for key, value in states.items()}
        cases = [(method, position) for method in ("decoder", "calls") for position in states]
        times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}

        def decode(method: str, position: int) -> None:
            state = states[position]
            for index in range(arguments.decode_tokens):
                if method == "calls":
                    state = model(tokens[:, index : index + 1], state).state
                else:
                    decoders[position].step(tokens[:, index])

        for case in cases:
            decode(*case)  # warm-up
        for index in range(arguments.rounds):
            # In alternating order, so that no case is always the first.
            for case in cases[:: 1 if index % 2 == 0 else -1]:
                times[case].append(benchmarking.time_call(partial(decode, *case), device) / arguments.decode_tokens)
    return {
        "dtype": dtype,
        "tokens_per_round": arguments.decode_tokens,
        "state_bytes": state.nbytes,
        "positions": [
            {
                "method": method,
                "position": position,
                "seconds_per_token": dataclasses.asdict(Spread.from_values(seconds)),
                "seconds_per_token_by_round": seconds,
                "ratio_to_first": median_ratio(seconds, times[method, arguments.positions[0]]),
            }
            for (method, position), seconds in times.items()
        ],
    }


def read_in_calls(model: MemoryTransformer, tokens: Tensor, call_length: int) -> tuple[Tensor, MemoryState]:
    """Return the losses of the next tokens (1, length) and the last state after calls of ``call_length`` tokens."""
    state, losses = model.init_state(1), []
    for start in range(0, tokens.shape[1] - 1, call_length):
        segment = tokens[:, start : start + call_length + 1]
        out = model(segment[:, :-1], state, labels=segment[:, 1:])
        state = out.state
        losses.append(out.nll)
    return torch.cat(losses, dim=1), state


def max_difference(state: MemoryState, reference: MemoryState) -> float:
    """Return the largest absolute difference between two states."""
    expected = reference.named_tensors()
    return max(float((x.double() - expected[name].double()).abs().max()) for name, x in state.named_tensors().items())


def measure_reading(
    model: MemoryTransformer, tokens: Tensor, dtype: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure the rate of each call length, and the difference between their results."""
    device: torch.device = arguments.device
    rates: dict[int, list[float]] = {call: [] for call in arguments.call_lengths}
    rows: dict[int, dict[str, Any]] = {}
    count = tokens.shape[1] - 1
    with benchmarking.autocast(device, dtype):
        losses, state = read_in_calls(model, tokens, arguments.call_lengths[0])
        for call in arguments.call_lengths:
            read = partial(read_in_calls, model, tokens, call)
            (call_losses, call_state), peak_bytes = benchmarking.call_with_peak(read, device)
            loss_difference = float((call_losses - losses).abs().max())
            state_difference = max_difference(call_state, state)
            rows[call] = {
                "call_length": call, "peak_bytes": peak_bytes, "state_bytes": call_state.nbytes,
                "loss_difference": loss_difference, "state_difference": state_difference,
                "equal": max(loss_difference, state_difference) <= TOLERANCE[dtype],
            }  # fmt: skip
        for _ in range(arguments.rounds):
            for call in arguments.call_lengths:
                rates[call].append(count / benchmarking.time_call(partial(read_in_calls, model, tokens, call), device))
    first = rates[arguments.call_lengths[0]]
    for call, row in rows.items():
        row["tokens_per_second"] = dataclasses.asdict(Spread.from_values(rates[call]))
        row["tokens_per_second_by_round"] = rates[call]
        row["ratio_to_first"] = median_ratio(rates[call], first)
    return {"dtype": dtype, "tokens": count, "calls": list(rows.values())}


def format_table(results: dict[str, Any]) -> list[str]:
    """Format the results as Markdown: a table of single tokens and one of reading."""
    size = results["model"]
    lines = [
        f"{benchmarking.format_machine(results['machine'])}. dim {size['dim']}, {size['depth']} layers, "
        f"{size['heads']} heads, vocabulary {size['vocab_size']}, window {size['window']}, {size['memory_length']} "
        f"entries of {size['compression_rate']}, batch 1. "
        f"Medians of {results['rounds']} interleaved rounds, minimum to maximum in brackets; ratios within a round.",
        "",
        "| one token at position | by | dtype | us | ratio | state MiB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results["decoding"]:
        for row in result["positions"]:
            low, mid, high = (1e6 * row["seconds_per_token"][key] for key in ("min", "median", "max"))
            lines.append(
                f"| {row['position']:,} | {row['method']} | {result['dtype']} | {mid:,.0f} ({low:,.0f}-{high:,.0f}) | "
                f"{row['ratio_to_first']:.3f} | {format_mib(result['state_bytes'])} |"
            )
    lines += ["", "| reading in calls of | dtype | tokens/s | ratio | difference | peak MiB |"]
    lines.append("|---|---|---|---|---|---|")
    for result in results["reading"]:
        for row in result["calls"]:
            low, mid, high = (row["tokens_per_second"][key] for key in ("min", "median", "max"))
            difference = f"{max(row['loss_difference'], row['state_difference']):.0e}"
            difference += "" if row["equal"] else ", TOO LARGE"
            lines.append(
                f"| {row['call_length']:,} | {result['dtype']} | {mid:,.0f} ({low:,.0f}-{high:,.0f}) | "
                f"{row['ratio_to_first']:.2f} | {difference} | {format_mib(row['peak_bytes'])} |"
            )
    return lines


def plot_results(path: str, results: dict[str, Any]) -> None:
    """Plot the rates of reading, and the times of single tokens in a second picture."""
    from memtx import plots

    target = Path(path)
    rates = {
        f"calls of {row['call_length']:,}, {result['dtype']}": row["tokens_per_second_by_round"]
        for result in results["reading"]
        for row in result["calls"]
    }
    plots.plot_seed_comparison(
        target, rates, title="Reading, by tokens per call", unit="tokens per second", lower_is_better=False
    )
    times = {
        f"{row['method']}, position {row['position']:,}, {result['dtype']}": [
            1e3 * seconds for seconds in row["seconds_per_token_by_round"]
        ]
        for result in results["decoding"]
        for row in result["positions"]
    }
    plots.plot_seed_comparison(
        target.with_stem(f"{target.stem}-decoding"), times, title="One token, by position", unit="ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[2_000, 1_000_000], help="positions to decode at")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's step")
    parser.add_argument("--call-lengths", type=int, nargs="+", default=[512, 4096, 32768], help="tokens per call")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens read with each call length")
    benchmarking.add_size_options(parser, decode_tokens=64, rounds=5)
    parser.add_argument("--dtypes", nargs="+", choices=list(benchmarking.DTYPES), default=["fp32"])
    sizes = {
        "dim": 256, "depth": 6, "heads": 4, "vocab_size": 8192, "window": 512, "memory_length": 128,
        "compression_rate": 4,
    }  # fmt: skip
    benchmarking.add_size_options(parser, **sizes)
    benchmarking.add_benchmark_options(parser)
    benchmarking.add_time_limit(parser)
    arguments = parser.parse_args()
    benchmarking.apply_benchmark_options(arguments)
    retain_freed_memory()  # as the commands do
    torch.manual_seed(0)
    memory = partial(
        CompressedMemory, window=arguments.window, compression_rate=arguments.compression_rate,
        num_entries=arguments.memory_length,
    )  # fmt: skip
    model = MemoryTransformer(arguments.vocab_size, arguments.dim, arguments.depth, arguments.heads, memories=[memory])
    model.to(arguments.device).eval()
    num_tokens = max(
        arguments.tokens,
        arguments.window + arguments.memory_length * arguments.compression_rate,
        arguments.decode_tokens,
    )
    tokens = torch.randint(0, arguments.vocab_size, (1, num_tokens + 1), device=arguments.device)
    decoding, reading = [], []
    with benchmarking.keep_measured(arguments), benchmarking.progress_bar() as bar, torch.inference_mode():
        task = bar.add_task("", total=2 * len(arguments.dtypes))
        for dtype in arguments.dtypes:
            bar.update(task, description=f"decoding {dtype}")
            decoding.append(measure_decoding(model, tokens, dtype, arguments))
            bar.update(task, description=f"reading {dtype}", advance=1)
            reading.append(measure_reading(model, tokens[:, : arguments.tokens + 1], dtype, arguments))
            bar.advance(task)
    results = {
        "machine": benchmarking.machine_info(arguments.device),
        "model": {name: getattr(arguments, name) for name in sizes}, "rounds": arguments.rounds, "decoding": decoding,
        "reading": reading,
    }  # fmt: skip
    if arguments.plot and reading:
        plot_results(arguments.plot, results)
    benchmarking.write_results(arguments, results, format_table(results))


if __name__ == "__main__":
    main()
