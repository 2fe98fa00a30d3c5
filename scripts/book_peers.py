"""Language models of other libraries, and memtx's own, behind one call for training and reading books side by side.

A peer is built with its library's own options: the best that were found for it on these books (see scripts/README.md).
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from book_stacks import STACKS
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.class_config import from_config
from memtx.data.batch import IGNORE_INDEX
from memtx.models.memory_transformer import MemoryTransformer

SEGMENT_LENGTH = 64
"""Tokens per call; every system carries what it keeps from call to call."""
BPTT_SEGMENTS = 2
"""Calls per training step."""
DIM, DEPTH, HEADS = 128, 3, 4

Output = tuple[Tensor, Tensor, Any]
"""The sum of the labels' nats, which has a graph, the nats of every label, ``(batch, length)``, and the next state."""
Read = Callable[[Tensor, Tensor, Tensor, Any], Output]
"""Maps tokens, labels and document starts, ``(batch, length)`` each, and the carried state, None at first."""


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    nats = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return nats.sum(), nats.detach()


def build_memtx(vocab_size: int, *, stack: str) -> tuple[nn.Module, Read]:
    """Build a stack of compare_books.py."""
    model: MemoryTransformer = from_config(STACKS[stack].model_config())(vocab_size)

    def read(tokens: Tensor, labels: Tensor, document_starts: Tensor, state: Any) -> Output:
        if state is None:
            state = model.init_state(len(tokens))
        output = model(tokens, state, document_starts=document_starts, labels=labels)
        assert output.loss is not None
        assert output.nll is not None
        return output.loss * (labels != IGNORE_INDEX).sum(), output.nll, output.state

    return model, read


def build_x_transformers(
    vocab_size: int,
    *,
    cache_length: int = SEGMENT_LENGTH,
    num_memory_tokens: int = 0,
    ttt_lr: float | None = None,
    **options: Any,
) -> tuple[nn.Module, Read]:
    """Build a decoder with Transformer-XL's cache, rotary positions, RMSNorm, SwiGLU 384 and tied embeddings.

    Args:
        vocab_size: Vocabulary size.
        cache_length: Positions of the cache.
        num_memory_tokens: Learned tokens in front of every call.
        ttt_lr: Learning rate of the last feed-forward part's weights while reading: test-time training.
        **options: Further options of the layers.
    """
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(
        dim=DIM, depth=DEPTH, heads=HEADS, attn_dim_head=DIM // HEADS, rotary_pos_emb=True,
        rotary_emb_dim=DIM // HEADS, use_rmsnorm=True, ff_glu=True, ff_swish=True, ff_no_bias=True, ff_mult=3,
        verbose=False, **options,
    )  # fmt: skip
    model = library.TransformerWrapper(
        num_tokens=vocab_size, max_seq_len=SEGMENT_LENGTH, max_mem_len=cache_length, attn_layers=layers,
        use_abs_pos_emb=False, tie_embedding=True, num_memory_tokens=num_memory_tokens,
    )  # fmt: skip
    if ttt_lr is None:

        def read(tokens: Tensor, labels: Tensor, document_starts: Tensor, state: Any) -> Output:
            logits, state = model(tokens, mems=state, return_mems=True)
            return *_score(logits, labels), state

        return model, read

    path, num_calls = f"attn_layers.layers.{2 * DEPTH - 1}.1", itertools.count()
    wrapper = library.XLAutoregressiveWrapper(model, ttt_module_paths=(path,), ttt_lr=ttt_lr, tbptt_steps=2)

    def read_and_adapt(tokens: Tensor, labels: Tensor, document_starts: Tensor, state: Any) -> Output:
        with torch.enable_grad():
            # As in the library's own training call, every step begins with the learned weights; a reading, once.
            if next(num_calls) % BPTT_SEGMENTS == 0 if model.training else state is None:
                wrapper.init_ttt(len(tokens))
            logits, intermediates = model(tokens, mems=state, return_mems=True, return_intermediates=True)
            wrapper.update_ttt(logits, labels, create_graph=model.training)
        return *_score(logits, labels), intermediates.mems

    return model, read_and_adapt


def build_recurrent_memory_transformer(vocab_size: int) -> tuple[nn.Module, Read]:
    """Build the Recurrent Memory Transformer with 16 memory tokens, a cache of one segment and rotary positions.

    Its embeddings are not tied, and its feed-forward parts have the library's default width: 1.13 M parameters.
    """
    library: Any = importlib.import_module("recurrent_memory_transformer_pytorch")
    model = library.RecurrentMemoryTransformer(
        dim=DIM, num_tokens=vocab_size, depth=DEPTH, num_memory_tokens=16, seq_len=SEGMENT_LENGTH, heads=HEADS,
        dim_head=DIM // HEADS, xl_mem_len=SEGMENT_LENGTH, abs_pos_emb=False, rotary_pos_emb=True,
    )  # fmt: skip

    def read(tokens: Tensor, labels: Tensor, document_starts: Tensor, state: Any) -> Output:
        tokens_read, cache = state if state is not None else (None, None)
        logits, tokens_read, cache = model(tokens, tokens_read, xl_memories=cache)
        return *_score(logits, labels), (tokens_read, cache)

    return model, read


@dataclass(frozen=True)
class Peer:
    """A system of the comparison.

    Attributes:
        build: Builds the model and its function from the vocabulary size.
        learning_rate: Peak learning rate: the best of several after 40 CPU seconds.
        packages: Packages for ``pip install --no-deps``.
    """

    build: Callable[[int], tuple[nn.Module, Read]]
    learning_rate: float
    packages: str = ""


_X_TRANSFORMERS = "x-transformers einx loguru torch-einops-utils sympy frozendict"
_RECURRENT = "recurrent-memory-transformer-pytorch hyper-connections torch-einops-utils"
PEERS = {
    "memtx windows+copy": Peer(partial(build_memtx, stack="windows+copy"), 4e-3),
    "memtx windows": Peer(partial(build_memtx, stack="windows"), 2e-3),
    "x-transformers": Peer(build_x_transformers, 8e-3, _X_TRANSFORMERS),
    "x-transformers adapting": Peer(partial(build_x_transformers, ttt_lr=0.1), 8e-3, _X_TRANSFORMERS),
    "recurrent-memory-transformer": Peer(build_recurrent_memory_transformer, 8e-3, _RECURRENT),
}
"""Systems by name."""
