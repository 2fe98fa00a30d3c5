"""The systems that bench_step.py compares, each as a function of a segment and a carried state that returns a loss.

Every peer is used as in its own README, with its defaults for everything that the job does not set. Its state is
whatever it returns; bench_step.py detaches it.
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
from memtx.memory.compression import AttentionReconstruction
from memtx.models.memory_transformer import MemoryTransformer


@dataclass(frozen=True)
class Job:
    """The sizes that all systems share.

    Attributes:
        batch_size: Batch size.
        segment_length: Tokens per call.
        dim: Width of the hidden states.
        depth: Number of layers.
        heads: Attention heads per layer.
        vocab_size: Vocabulary size.
        cache_length: Exact positions carried.
        memory_length: Compressed entries, slots or memory tokens carried.
        compression_rate: Positions per compressed entry.
    """

    batch_size: int = 4
    segment_length: int = 512
    dim: int = 256
    depth: int = 6
    heads: int = 4
    vocab_size: int = 8192
    cache_length: int = 512
    memory_length: int = 128
    compression_rate: int = 4

    @property
    def warmup_segments(self) -> int:
        """Number of segments that fill the memory, plus one."""
        return -(-(self.cache_length + self.memory_length * self.compression_rate) // self.segment_length) + 1


Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""Maps tokens (batch, length + 1) int64 and the carried state to the loss of the next tokens and the next state."""

ModelAndForward = tuple[nn.Module, Forward]


@dataclass(frozen=True)
class System:
    """A system of the comparison.

    Attributes:
        build: Builds the model and its function.
        module: Imported module.
        install: Packages for ``pip install --no-deps`` if the module is missing.
        note: Description of the system.
    """

    build: Callable[[Job], ModelAndForward]
    module: str = "memtx"
    install: str = ""
    note: str = ""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss of logits (batch, length, vocab_size) for tokens (batch, length + 1)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build_memtx(job: Job, *, reconstruction: bool = False, compiled: bool = False) -> ModelAndForward:
    """Build memtx's model: cache and compressed memory in every layer."""
    memory = partial(
        CompressedMemory, window=job.cache_length, compression_rate=job.compression_rate, num_entries=job.memory_length,
        reconstruction=AttentionReconstruction if reconstruction else None,
    )  # fmt: skip
    model = MemoryTransformer(job.vocab_size, job.dim, job.depth, job.heads, memories=[memory])
    call: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = model.init_state(job.batch_size)
        out = call(tokens[:, :-1], state, labels=tokens[:, 1:])
        return out.loss, out.state

    return model, forward


def build_x_transformers(job: Job, *, cache_length: int, flash: bool = False) -> ModelAndForward:
    """Build x-transformers' decoder with Transformer-XL's cache and rotary positions."""
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(
        dim=job.dim, depth=job.depth, heads=job.heads, attn_dim_head=job.dim // job.heads, rotary_pos_emb=True,
        attn_flash=flash,
    )  # fmt: skip
    model = library.TransformerWrapper(
        num_tokens=job.vocab_size, max_seq_len=job.segment_length, max_mem_len=cache_length, attn_layers=layers,
        use_abs_pos_emb=False,
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens[:, :-1], mems=state, return_mems=True)
        return next_token_loss(logits, tokens), state

    return model, forward


def build_compressive_transformer(job: Job) -> ModelAndForward:
    """Build the Compressive Transformer with memories in all layers, like memtx; its auxiliary loss is always on."""
    library: Any = importlib.import_module("compressive_transformer_pytorch")
    model = library.CompressiveTransformer(
        num_tokens=job.vocab_size, dim=job.dim, seq_len=job.segment_length, depth=job.depth, heads=job.heads,
        mem_len=job.cache_length, cmem_len=job.memory_length, cmem_ratio=job.compression_rate,
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state, auxiliary = model(tokens[:, :-1], memories=state)
        return next_token_loss(logits, tokens) + auxiliary.sum(), state

    return model, forward


def build_recurrent_memory_transformer(job: Job) -> ModelAndForward:
    """Build the Recurrent Memory Transformer with a cache of one segment and ``memory_length`` memory tokens."""
    library: Any = importlib.import_module("recurrent_memory_transformer_pytorch")
    model = library.RecurrentMemoryTransformer(
        dim=job.dim, num_tokens=job.vocab_size, depth=job.depth, num_memory_tokens=job.memory_length,
        seq_len=job.segment_length, dim_head=job.dim // job.heads, heads=job.heads,
        xl_mem_len=min(job.cache_length, job.segment_length),
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        read, cache = state if state is not None else (None, None)
        loss, read, cache = model(tokens[:, :-1], read, labels=tokens[:, 1:], xl_memories=cache)
        return loss, (read, cache)

    return model, forward


def build_block_recurrent_transformer(job: Job) -> ModelAndForward:
    """Build the Block-Recurrent Transformer with a cache of one block and ``memory_length`` state vectors."""
    library: Any = importlib.import_module("block_recurrent_transformer_pytorch")
    model = library.BlockRecurrentTransformer(
        num_tokens=job.vocab_size, dim=job.dim, depth=job.depth, dim_head=job.dim // job.heads, heads=job.heads,
        max_seq_len=job.segment_length, block_width=job.segment_length, num_state_vectors=job.memory_length,
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, vectors = state if state is not None else ([], [])
        loss, cache, vectors = model(tokens, return_loss=True, xl_memories=cache, states=vectors)
        return loss, (cache, vectors)

    return model, forward


def build_memformer(job: Job) -> ModelAndForward:
    """Build Memformer: half the layers encode the previous segment, which feeds the slots, and half decode."""
    library: Any = importlib.import_module("memformer")
    half = max(1, job.depth // 2)
    model = library.Memformer(
        dim=job.dim, num_memory_slots=job.memory_length, mem_update_attn_heads=job.heads, enc_num_tokens=job.vocab_size,
        enc_max_seq_len=job.segment_length, enc_depth=half, enc_heads=job.heads, dec_num_tokens=job.vocab_size,
        dec_max_seq_len=job.segment_length, dec_depth=max(1, job.depth - half), dec_heads=job.heads,
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        slots, previous = state if state is not None else (None, torch.zeros_like(tokens[:, :-1]))
        _, slots, loss = model(previous, tokens, mems=slots)
        return loss, (slots, tokens[:, :-1])

    return model, forward


def build_infini_transformer(job: Job) -> ModelAndForward:
    """Build the Infini-Transformer with the delta rule: attention within the segment, the past in fast weights."""
    library: Any = importlib.import_module("infini_transformer_pytorch")
    model = library.InfiniTransformer(
        num_tokens=job.vocab_size, dim=job.dim, depth=job.depth, dim_head=job.dim // job.heads, heads=job.heads,
        use_mem_delta_rule=True,
    )  # fmt: skip

    def forward(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, _, state = model(tokens[:, :-1], past_memories=state, return_new_memories=True)
        return next_token_loss(logits, tokens), state

    return model, forward


_X_TRANSFORMERS_PACKAGES = ("x_transformers", "x-transformers einx loguru torch-einops-utils sympy frozendict")

SYSTEMS: dict[str, System] = {
    "memtx": System(build_memtx, note="cache and compressed memory"),
    "memtx-reconstruction": System(partial(build_memtx, reconstruction=True), note="with the auxiliary loss"),
    "memtx-compiled": System(partial(build_memtx, compiled=True), note="compiled by torch.compile during warm-up"),
    "x-transformers-640": System(
        partial(build_x_transformers, cache_length=640), *_X_TRANSFORMERS_PACKAGES, "XL cache of 640, rotary"
    ),
    "x-transformers-512": System(
        partial(build_x_transformers, cache_length=512), *_X_TRANSFORMERS_PACKAGES, "XL cache of 512, rotary"
    ),
    "x-transformers-640-flash": System(
        partial(build_x_transformers, cache_length=640, flash=True),
        *_X_TRANSFORMERS_PACKAGES,
        "XL cache of 640, rotary, attn_flash=True",
    ),
    "compressive-transformer-pytorch": System(
        build_compressive_transformer,
        "compressive_transformer_pytorch",
        "compressive-transformer-pytorch mogrifier",
        "cache and compressed memory, auxiliary loss",
    ),
    "recurrent-memory-transformer-pytorch": System(
        build_recurrent_memory_transformer,
        "recurrent_memory_transformer_pytorch",
        "recurrent-memory-transformer-pytorch hyper-connections torch-einops-utils",
        "memory tokens and XL cache",
    ),
    "block-recurrent-transformer-pytorch": System(
        build_block_recurrent_transformer,
        "block_recurrent_transformer_pytorch",
        "block-recurrent-transformer-pytorch beartype",
        "state vectors in one layer and XL cache, one key and value head",
    ),
    "memformer": System(build_memformer, "memformer", "memformer", "slots; half encoder, half decoder"),
    "infini-transformer-pytorch": System(
        build_infini_transformer,
        "infini_transformer_pytorch",
        "infini-transformer-pytorch rotary-embedding-torch",
        "fast weights, no cache",
    ),
}

BASELINE = "x-transformers-640"
OPTIONAL_SYSTEMS = ("memtx-reconstruction", "memtx-compiled")
"""Systems that run only if --systems names them."""
