"""Measure snapshots of a stream's state: their size, and the bits per byte of the text read from them.

    python scripts/measure_snapshots.py --checkpoint RUN FILE... [--tokens N] [--json FILE]

Reads the first N tokens of each file, saves the state exactly and in 8 bits, loads both and reads the next N tokens.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import benchmarking
import torch
from torch import Tensor

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

SEGMENT_LENGTH = 512


def read(model: MemoryTransformer, tokens: Tensor, state: MemoryState | None) -> tuple[float, MemoryState]:
    """Read ``tokens`` ``(1, length)`` after a state; return the sum of the losses in bits, and the state."""
    bits = 0.0
    for start in range(0, tokens.shape[1] - 1, SEGMENT_LENGTH):
        segment = tokens[:, start : start + SEGMENT_LENGTH + 1]
        output = model(segment[:, :-1], state, labels=segment[:, 1:])
        assert output.nll is not None
        bits, state = bits + float(output.nll.double().sum()) / math.log(2), output.state
    assert state is not None
    return bits, state


def main() -> None:
    """Print a table of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=benchmarking.positive_int, default=8192)
    benchmarking.add_output_options(parser)
    arguments = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(arguments.checkpoint, None)
    assert isinstance(model, MemoryTransformer)
    rows: dict[str, Any] = {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for path in arguments.files:
            text = path.read_text(encoding="utf-8")
            ids = torch.as_tensor(tokenizer.encode(text)[: 2 * arguments.tokens + 1]).long()[None]
            past, future = ids[:, : arguments.tokens + 1], ids[:, arguments.tokens :]
            num_bytes = sum(len(tokenizer.token_bytes(token)) for token in future[0, 1:].tolist())
            _, state = read(model, past, None)
            row: dict[str, float] = {}
            for dtype in ("exact", "int8"):
                snapshot = Path(folder) / dtype
                state.save(snapshot, model.fingerprint, dtype=dtype)  # type: ignore[arg-type]
                loaded = MemoryState.load(snapshot, like=model.init_state(1), fingerprint=model.fingerprint)
                row[f"{dtype}_bytes"] = snapshot.stat().st_size
                row[f"{dtype}_bits_per_byte"] = read(model, future, loaded)[0] / num_bytes
            rows[path.name] = row
    lines = ["file | exact bytes | int8 bytes | exact bits per byte | int8 bits per byte | change"]
    for name, row in rows.items():
        exact, int8 = row["exact_bits_per_byte"], row["int8_bits_per_byte"]
        sizes = f"{row['exact_bytes']:,} | {row['int8_bytes']:,} ({row['int8_bytes'] / row['exact_bytes']:.1%})"
        lines.append(f"{name} | {sizes} | {exact:.5f} | {int8:.5f} | {int8 / exact - 1:+.3%}")
    benchmarking.write_results(arguments, rows, lines)


if __name__ == "__main__":
    main()
