"""Benchmark a hybrid of Gated DeltaNets and attention beside transformers, on the same folder.

    python scripts/bench_hybrid.py [--dim 512] [--depth 8] [--length 4096] [--rounds 5] [--json FILE] [--markdown FILE]

Writes a small Qwen 3.5 with random weights by transformers, which memtx[retrofit] brings, reads it with both and
alternates: forward, forward and backward, and the peak of their tensors' bytes. Then our decoder's time per token, four
streams at position 2,000 and at position 100,000, alternating too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import torch
from torch import Tensor, nn

from memtx import hf
from memtx.inference.decoder import Decoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cpu.malloc import retain_freed_memory

VOCAB_SIZE, WINDOW = 2000, 512
NEAR, FAR = 2_000, 100_000


def write_folder(path: Path, dim: int, depth: int, length: int) -> nn.Module:
    """Write a Qwen 3.5 whose layers have the published shares, and return transformers' model."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    heads = dim // 64
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), head_dim=64,
        linear_num_key_heads=max(heads // 2, 1), linear_num_value_heads=heads, linear_key_head_dim=64,
        linear_value_head_dim=64, max_position_embeddings=length,
    )  # fmt: skip
    model: nn.Module = Qwen3_5ForCausalLM(config)
    model.save_pretrained(path)  # type: ignore[operator]
    return model.eval()


def forward(model: nn.Module, tokens: Tensor, **options: Any) -> None:
    """Read the tokens without gradients."""
    with torch.inference_mode():
        model(tokens, **options)


def train(model: nn.Module, tokens: Tensor, **options: Any) -> None:
    """Read the tokens and compute all gradients."""
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, **options).loss.backward()


def measure_peak(call: Callable[[], None]) -> int:
    """Return the peak bytes of the tensors that a call creates."""
    with benchmarking.TensorMemoryTracker() as tracker:
        call()
    return int(tracker.peak)


def decode(decoder: Decoder, tokens: Tensor, steps: int) -> None:
    """Decode some tokens."""
    for _ in range(steps):
        decoder.step(tokens)


def main() -> None:
    """Print a table of both, with the ratios of the rounds' medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 512), ("depth", 8), ("length", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=benchmarking.positive_int, default=default)
    benchmarking.add_benchmark_options(parser)
    arguments = parser.parse_args()
    benchmarking.apply_benchmark_options(arguments)
    retain_freed_memory()
    torch.manual_seed(0)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        peer = write_folder(Path(folder), arguments.dim, arguments.depth, arguments.length)
        ours = hf.load(folder)
        windowed = hf.load(folder, window=WINDOW)
    assert isinstance(ours, MemoryTransformer)
    assert isinstance(windowed, MemoryTransformer)
    tokens = torch.randint(VOCAB_SIZE, (1, arguments.length))
    with torch.inference_mode():
        difference = (peer(tokens, use_cache=False).logits - ours(tokens).logits).abs().max().item()
    calls: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "forward": (partial(forward, peer, tokens, use_cache=False), partial(forward, ours, tokens)),
        "forward and backward": (partial(train, peer, tokens, use_cache=False), partial(train, ours, tokens)),
    }
    results: dict[str, Any] = {"largest_difference": difference}
    lines = [
        f"largest difference of the logits: {difference:.1e}",
        "| call | transformers | memtx | ratio |",
        "|---|---|---|---|",
    ]
    for name, pair in calls.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.rounds):
            for call, values in zip(pair, times, strict=True):
                values.append(benchmarking.time_call(call, device))
        peer_seconds, our_seconds = (statistics.median(values) for values in times)
        peaks = [measure_peak(call) for call in pair]
        results[name] = {"transformers_seconds": times[0], "memtx_seconds": times[1], "peak_bytes": peaks}
        lines.append(f"| {name} | {peer_seconds:.2f} s | {our_seconds:.2f} s | {peer_seconds / our_seconds:.2f} |")
        memory = [benchmarking.format_mib(peak) for peak in peaks]
        lines.append(f"| {name}, peak MiB of tensors | {memory[0]} | {memory[1]} | {peaks[1] / peaks[0]:.2f} |")
    state = windowed.init_state(4)
    with torch.inference_mode():
        state = windowed(torch.randint(VOCAB_SIZE, (4, NEAR)), state).state
    decoders = []
    for position in (NEAR, FAR):
        moved = type(state)(torch.full_like(state.position, position), state.layers)
        decoders.append(Decoder(windowed, moved))
    steps: tuple[list[float], list[float]] = ([], [])
    for _ in range(4 * arguments.rounds):
        for decoder, values in zip(decoders, steps, strict=True):
            values.append(benchmarking.time_call(partial(decode, decoder, tokens[0, :4], 25), device) / 25)
    ratio = statistics.median(far / near for near, far in zip(*steps, strict=True))
    results["decoding"] = {"near_seconds": steps[0], "far_seconds": steps[1], "far_to_near": ratio}
    near, far = (1e3 * statistics.median(values) for values in steps)
    lines.append(
        f"decoding, 4 streams: {near:.2f} ms at {NEAR:,}, {far:.2f} ms at {FAR:,}, median of ratios {ratio:.3f}"
    )
    lines.append(benchmarking.format_machine(benchmarking.machine_info(device)))
    benchmarking.write_results(arguments, results, lines)


if __name__ == "__main__":
    main()
