"""A small model folder and a book for the commands that read and generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from memtx.data.tokenizers import ByteTokenizer
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer

BOOK = "".join(f"CHAPTER {number}\n\n" + "It was a dark and störmy night.\n" * 30 for number in ("I", "II", "III"))


def pretrained(path: Path, seed: int = 0, window: int = 16) -> Path:
    torch.manual_seed(seed)
    memories = [partial(CompressedMemory, window=window, compression_rate=4, num_entries=4)]
    MemoryTransformer(257, dim=16, depth=1, heads=2, memories=memories).save_pretrained(path)
    ByteTokenizer().save(path / "tokenizer.json")
    return path
