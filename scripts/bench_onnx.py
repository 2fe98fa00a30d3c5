"""Time an exported model in onnxruntime beside the eager model, in alternation on the CPU.

    memtx convert runs/books out --to onnx
    OMP_NUM_THREADS=2 python scripts/bench_onnx.py runs/books out --rounds 20

Prints a line per graph: median milliseconds of both with their quartiles, the ratio, and the largest difference of the
logits. The eager model decodes through its step as a segment of one token, as the graph does, not by its ring buffers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from memtx.checkpoint.load import load
from memtx.models.memory_transformer import MemoryTransformer


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds of a call and its result."""
    start = time.perf_counter()
    result = function()
    return (time.perf_counter() - start) * 1000, result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time an exported model beside the eager one.")
    parser.add_argument("checkpoint", help="what was exported")
    parser.add_argument("folder", type=Path, help="folder of memtx convert --to onnx")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--window", type=int, help="as given to memtx convert")
    arguments = parser.parse_args()
    model = load(arguments.checkpoint, arguments.window).model_as(MemoryTransformer).float()
    description = json.loads((arguments.folder / "export.json").read_text(encoding="utf-8"))
    batch_size, vocab_size = description["batch_size"], description["vocab_size"]
    state_names = [entry["name"] for entry in description["inputs"][2:]]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    files = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(arguments.folder.iterdir()))
    print(f"{torch.get_num_threads()} threads, {batch_size} streams; {files}")
    for name, program in description["programs"].items():
        path = str(arguments.folder / program["file"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        length = program["length"]
        generator, document_starts = np.random.default_rng(0), np.zeros((batch_size, length), dtype=bool)
        arrays = {entry["name"]: np.zeros(entry["shape"], dtype=entry["dtype"]) for entry in description["inputs"][2:]}
        state, times, difference = model.init_state(batch_size), [], 0.0
        for _ in range(arguments.rounds + 1):
            tokens = generator.integers(0, vocab_size, (batch_size, length))
            feeds = {"tokens": tokens, "document_starts": document_starts, **arrays}
            with torch.inference_mode():
                eager, output = timed(partial(model, torch.from_numpy(tokens), state))
            exported, (logits, *leaves) = timed(partial(session.run, None, feeds))
            state, arrays = output.state, dict(zip(state_names, leaves, strict=True))
            times.append((eager, exported))
            difference = max(difference, float(np.abs(output.logits.numpy() - logits).max()))
        quartiles = np.quantile(np.array(times[1:]), (0.25, 0.5, 0.75), axis=0).T  # the first call warms up
        (low, eager, high), (low_exported, exported, high_exported) = quartiles
        print(
            f"{name} ({length} tokens): eager {eager:.1f} ms ({low:.1f} to {high:.1f}), onnxruntime {exported:.1f} ms "
            f"({low_exported:.1f} to {high_exported:.1f}), {eager / exported:.2f} x; logits differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
