from __future__ import annotations

from functools import partial

import pytest
import torch

from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer

TEXT = "CHAPTER I\n\nThe quick brown fox jumps over the lazy dog. Ünïcödé and 🙂 emoji.\n\n" * 40


def tiny_model(vocab_size: int, seed: int = 0) -> MemoryTransformer:
    torch.manual_seed(seed)
    memories = [partial(CompressedMemory, window=16, compression_rate=4, num_entries=4)]
    model = MemoryTransformer(vocab_size, dim=16, depth=2, heads=2, memories=memories)
    with torch.no_grad():
        for weight in model.parameters():
            # Logits far from uniform, so that a wrong memory shows.
            weight.mul_(5) if weight.dim() > 1 else None
    return model.eval()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def pair_tokenizer() -> Tokenizer:
    tokenizer = BytePairTokenizer(300)
    tokenizer.train([TEXT])
    return tokenizer


@pytest.fixture(scope="session")
def byte_model() -> MemoryTransformer:
    return tiny_model(257)


@pytest.fixture(scope="session")
def pair_model(pair_tokenizer: Tokenizer) -> MemoryTransformer:
    return tiny_model(pair_tokenizer.vocab_size)


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT
