"""The systems that bench_step.py compares, each behind one function from a segment and what it carries to a loss.

Every peer is used as its own README does, with its defaults where the job does not say otherwise. What it carries is
whatever it hands back; bench_step.py cuts it from the graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.memory.compressed import CompressedMemory
from memtx.memory.reconstruction import AttentionReconstruction
from memtx.models.memory_transformer import MemoryTransformer


@dataclass(frozen=True)
class Job:
    """One size for all systems.

    Attributes:
        rows: streams in the batch.
        segment: tokens a call.
        dim: width of the hidden states.
        depth: layers.
        heads: attention heads a layer.
        vocab: tokens there are.
        cache: exact positions carried.
        memory: compressed entries, slots or memory tokens carried.
        rate: positions a compressed entry stands for.
    """

    rows: int = 4
    segment: int = 512
    dim: int = 256
    depth: int = 6
    heads: int = 4
    vocab: int = 8192
    cache: int = 512
    memory: int = 128
    rate: int = 4

    @property
    def filling(self) -> int:
        """Segments until the memory is full, and one more."""
        return -(-(self.cache + self.memory * self.rate) // self.segment) + 1


Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""From (rows, segment + 1) int64 tokens and what was carried to the loss of the next tokens and what is carried on."""

Built = tuple[nn.Module, Forward]


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Attributes:
        build: makes the model and its function.
        module: what it imports.
        install: what pip is to install, without dependencies, where that is missing.
        note: what the row stands for.
    """

    build: Callable[[Job], Built]
    module: str = "memtx"
    install: str = ""
    note: str = ""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss of logits (rows, segment, vocab) for tokens (rows, segment + 1)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def memtx(job: Job, *, reconstruction: bool = False, compiled: bool = False) -> Built:
    """Build this package's model: cache and compressed memory in every layer."""
    memory = partial(
        CompressedMemory,
        window=job.cache,
        rate=job.rate,
        length=job.memory,
        reconstruction=AttentionReconstruction if reconstruction else None,
    )
    model = MemoryTransformer(job.vocab, job.dim, job.depth, job.heads, memories=[memory])
    call: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = model.init_state(job.rows)
        out = call(tokens[:, :-1], state, labels=tokens[:, 1:])
        return out.loss, out.state

    return model, forward


def x_transformers(job: Job, *, cache: int, flash: bool = False) -> Built:
    """Build a decoder with Transformer-XL's cache and rotary positions."""
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(
        dim=job.dim,
        depth=job.depth,
        heads=job.heads,
        attn_dim_head=job.dim // job.heads,
        rotary_pos_emb=True,
        attn_flash=flash,
    )
    model = library.TransformerWrapper(
        num_tokens=job.vocab, max_seq_len=job.segment, max_mem_len=cache, attn_layers=layers, use_abs_pos_emb=False
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens[:, :-1], mems=state, return_mems=True)
        return next_token_loss(logits, tokens), state

    return model, forward


def compressive_transformer(job: Job) -> Built:
    """Build it with memories in all layers, as ours; its auxiliary loss is always on."""
    library: Any = importlib.import_module("compressive_transformer_pytorch")
    model = library.CompressiveTransformer(
        num_tokens=job.vocab,
        dim=job.dim,
        seq_len=job.segment,
        depth=job.depth,
        heads=job.heads,
        mem_len=job.cache,
        cmem_len=job.memory,
        cmem_ratio=job.rate,
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state, auxiliary = model(tokens[:, :-1], memories=state)
        return next_token_loss(logits, tokens) + auxiliary.sum(), state

    return model, forward


def recurrent_memory_transformer(job: Job) -> Built:
    """Build it with its cache of one segment and as many memory tokens as ours has compressed entries."""
    library: Any = importlib.import_module("recurrent_memory_transformer_pytorch")
    model = library.RecurrentMemoryTransformer(
        dim=job.dim,
        num_tokens=job.vocab,
        depth=job.depth,
        num_memory_tokens=job.memory,
        seq_len=job.segment,
        dim_head=job.dim // job.heads,
        heads=job.heads,
        xl_mem_len=min(job.cache, job.segment),
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        read, cache = state if state is not None else (None, None)
        loss, read, cache = model(tokens[:, :-1], read, labels=tokens[:, 1:], xl_memories=cache)
        return loss, (read, cache)

    return model, forward


def block_recurrent_transformer(job: Job) -> Built:
    """Build it with its cache of one block and as many state vectors as ours has compressed entries."""
    library: Any = importlib.import_module("block_recurrent_transformer_pytorch")
    model = library.BlockRecurrentTransformer(
        num_tokens=job.vocab,
        dim=job.dim,
        depth=job.depth,
        dim_head=job.dim // job.heads,
        heads=job.heads,
        max_seq_len=job.segment,
        block_width=job.segment,
        num_state_vectors=job.memory,
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, vectors = state if state is not None else ([], [])
        loss, cache, vectors = model(tokens, return_loss=True, xl_memories=cache, states=vectors)
        return loss, (cache, vectors)

    return model, forward


def memformer(job: Job) -> Built:
    """Build half the layers as encoder of the previous segment, which feeds the slots, half as decoder of this one."""
    library: Any = importlib.import_module("memformer")
    half = max(1, job.depth // 2)
    model = library.Memformer(
        dim=job.dim,
        num_memory_slots=job.memory,
        mem_update_attn_heads=job.heads,
        enc_num_tokens=job.vocab,
        enc_max_seq_len=job.segment,
        enc_depth=half,
        enc_heads=job.heads,
        dec_num_tokens=job.vocab,
        dec_max_seq_len=job.segment,
        dec_depth=max(1, job.depth - half),
        dec_heads=job.heads,
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        slots, previous = state if state is not None else (None, torch.zeros_like(tokens[:, :-1]))
        _, slots, loss = model(previous, tokens, mems=slots)
        return loss, (slots, tokens[:, :-1])

    return model, forward


def infini_transformer(job: Job) -> Built:
    """Build it with the delta rule, as its README does: attention within the segment, the past in fast weights."""
    library: Any = importlib.import_module("infini_transformer_pytorch")
    model = library.InfiniTransformer(
        num_tokens=job.vocab,
        dim=job.dim,
        depth=job.depth,
        dim_head=job.dim // job.heads,
        heads=job.heads,
        use_mem_delta_rule=True,
    )

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, _, state = model(tokens[:, :-1], past_memories=state, return_new_memories=True)
        return next_token_loss(logits, tokens), state

    return model, forward


_X = ("x_transformers", "x-transformers einx loguru torch-einops-utils sympy frozendict")

SYSTEMS: dict[str, System] = {
    "memtx": System(memtx, note="cache and compressed memory"),
    "memtx-reconstruction": System(partial(memtx, reconstruction=True), note="with the auxiliary loss"),
    "memtx-compiled": System(partial(memtx, compiled=True), note="through torch.compile; its warm-up compiles"),
    "x-transformers-640": System(partial(x_transformers, cache=640), *_X, "XL cache of 640, rotary"),
    "x-transformers-512": System(partial(x_transformers, cache=512), *_X, "XL cache of 512, rotary"),
    "x-transformers-640-flash": System(
        partial(x_transformers, cache=640, flash=True), *_X, "XL cache of 640, rotary, attn_flash=True"
    ),
    "compressive-transformer-pytorch": System(
        compressive_transformer,
        "compressive_transformer_pytorch",
        "compressive-transformer-pytorch mogrifier",
        "cache and compressed memory, auxiliary loss",
    ),
    "recurrent-memory-transformer-pytorch": System(
        recurrent_memory_transformer,
        "recurrent_memory_transformer_pytorch",
        "recurrent-memory-transformer-pytorch hyper-connections torch-einops-utils",
        "memory tokens and XL cache",
    ),
    "block-recurrent-transformer-pytorch": System(
        block_recurrent_transformer,
        "block_recurrent_transformer_pytorch",
        "block-recurrent-transformer-pytorch beartype",
        "state vectors in one layer and XL cache, one key and value head",
    ),
    "memformer": System(memformer, "memformer", "memformer", "slots; half encoder, half decoder"),
    "infini-transformer-pytorch": System(
        infini_transformer,
        "infini_transformer_pytorch",
        "infini-transformer-pytorch rotary-embedding-torch",
        "fast weights, no cache",
    ),
}

BASELINE = "x-transformers-640"
EXTRA = ("memtx-reconstruction", "memtx-compiled")
"""Rows to be asked for by name."""
