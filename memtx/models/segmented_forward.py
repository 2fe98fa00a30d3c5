"""A call read in chunks: long calls in pieces that fit the CPU cache, and memory tokens interval by interval.

Memory tokens are written at the top of the stack and read at its bottom, so chunks end where the interval of any stream
ends. There the write tokens go through the layers after the interval, and their outputs go through the layers alone to
become the memory tokens of the next interval; streams whose interval has not ended keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.block import Block
from memtx.memory.base import Losses
from memtx.memory.memory_tokens import TokenMemory, TokenState
from memtx.segment import Segment
from memtx.state import MemoryState

LayerStates = tuple[tuple[Any, ...], ...]
"""States of each layer's memories."""

RunLayers = Callable[[Tensor, LayerStates, Segment], tuple[list[Tensor], LayerStates, Losses]]
"""Maps inputs, states and positions of one chunk to hidden states, next states and losses."""

MAX_CHUNK_TOKENS = 4096
"""Tokens of all streams read at once on the CPU without gradient: a layer's activations then stay in the cache."""

MIN_CHUNK_LENGTH = 1024
"""Minimum tokens per stream of such a chunk: every chunk projects the layers' caches again."""


@dataclass(frozen=True)
class TokenParts:
    """Parts of a model that memory tokens go through.

    Attributes:
        run_layers: Function that reads one chunk.
        blocks: The layers.
        tokens: Learned tokens, ``(num_tokens, dim)``.
        norm: Norm of the last layer's outputs.
        absolute_positions: Position embeddings, if the model has them.
    """

    run_layers: RunLayers
    blocks: Sequence[Block]
    tokens: Tensor
    norm: Callable[[Tensor], Tensor]
    absolute_positions: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class MemoryTokens:
    """Memory tokens of a model.

    Attributes:
        memory_indices: Their index among the memories of each layer.
        num_tokens: Number of tokens.
        interval: Tokens of a document after which they are written.
    """

    memory_indices: tuple[int, ...]
    num_tokens: int
    interval: int

    @classmethod
    def from_blocks(cls, blocks: Sequence[Block]) -> MemoryTokens | None:
        """Return the memory tokens of the layers, or None; raises MemtxError unless all layers have the same."""
        stacks = [enumerate(block.attention.memories) for block in blocks]
        per_layer = [
            [(index, memory) for index, memory in stack if isinstance(memory, TokenMemory)] for stack in stacks
        ]
        if not any(per_layer):
            return None
        settings = {(memory.num_tokens, memory.interval) for layer in per_layer for _, memory in layer}
        if any(len(layer) != 1 for layer in per_layer) or len(settings) != 1:
            message = "Memory tokens go through all layers, but not all have one TokenMemory with equal settings."
            raise MemtxError(message, "Give one list of memories for all layers.")
        return cls(tuple(layer[0][0] for layer in per_layer), *settings.pop())

    def input_position(self, position: Tensor) -> Tensor:
        """Return the positions that tokens at these positions in the document are embedded at."""
        return position

    def forward(
        self, parts: TokenParts, segment: Segment, x: Tensor, state: MemoryState, document_starts: Tensor | None
    ) -> tuple[list[Tensor], LayerStates, Losses]:
        """Read a call in chunks that end at interval ends, and write the memory tokens there.

        The outputs of the learned tokens become the memory tokens. Other arguments and results as in
        :func:`forward_in_chunks`.
        """
        # Also called where no interval ends, which changes nothing, so that the shapes stay the same.
        after_chunk = partial(_update_memory_tokens, parts.blocks, self, parts.tokens)
        call = (find_chunk_ends(segment, parts.blocks), x, state, document_starts)
        hidden, layers, losses = forward_in_chunks(parts.run_layers, *call, after_chunk)
        # If no later call reads the written tokens, they have no gradient; DDP needs one, which is then zero.
        hidden[-1] = hidden[-1] + 0.0 * parts.tokens.sum()
        return hidden, layers, losses


def find_chunk_ends(segment: Segment, blocks: Sequence[Block]) -> list[int]:
    """Return the offsets at which the chunks of a call end, or an empty list to read it at once."""
    memories = [memory for block in blocks for memory in block.attention.memories]
    intervals = {memory.interval for memory in memories if memory.needs_layer_output or isinstance(memory, TokenMemory)}
    if offsets := {offset for interval in intervals if interval for offset in segment.split_offsets(interval)}:
        return sorted(offsets)
    batch_size, length = segment.position.shape
    chunk_length = max(MAX_CHUNK_TOKENS // batch_size, MIN_CHUNK_LENGTH)
    if (
        segment.valid_length is not None  # the caller chose the length
        or length <= chunk_length
        or segment.position.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(memory.depends_on_segmentation for memory in memories)
    ):
        return []
    return [*range(chunk_length, length, chunk_length), length]


def forward_in_chunks(
    run_layers: RunLayers,
    chunk_ends: Sequence[int],
    x: Tensor,
    state: MemoryState,
    document_starts: Tensor | None,
    after_chunk: Callable[[LayerStates, Tensor], LayerStates] | None = None,
) -> tuple[list[Tensor], LayerStates, Losses]:
    """Read a call chunk by chunk; returns as ``run_layers`` does, with losses averaged, weighted by chunk length.

    Args:
        run_layers: Function that reads one chunk.
        chunk_ends: Offsets at which the chunks end, the call's end last.
        x: Embedded tokens, ``(batch, length, dim)``.
        state: State before the call.
        document_starts: ``(batch, length)`` bool, True where a document begins; None for nowhere.
        after_chunk: Updates the states after each chunk, given them and the tokens read so far, ``(batch,)`` int64.
    """
    layers, position, start = state.layers, state.position, 0
    chunks: list[list[Tensor]] = []
    losses: Losses = {}
    for end in chunk_ends:
        starts_in_chunk = None if document_starts is None else document_starts[:, start:end]
        segment = Segment.from_document_starts(position, end - start, starts_in_chunk)
        hidden, layers, chunk_losses = run_layers(x[:, start:end], layers, segment)
        position = segment.next_position
        if after_chunk is not None:
            layers = after_chunk(layers, position)
        chunks.append(hidden)
        for name, loss in chunk_losses.items():
            weighted = loss * ((end - start) / x.shape[1])
            losses[name] = losses[name] + weighted if name in losses else weighted
        start = end
    return [torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)], layers, losses


def _update_memory_tokens(
    blocks: Sequence[Block], memory_tokens: MemoryTokens, write_tokens: Tensor, layers: LayerStates, position: Tensor
) -> LayerStates:
    """Return the states with new memory tokens in the streams whose interval has just ended."""
    batch_size, num_tokens = position.shape[0], write_tokens.shape[0]
    x = write_tokens.expand(batch_size, -1, -1)
    segment = Segment.from_document_starts(position, num_tokens)
    for block, states in zip(blocks, layers, strict=True):
        # The states after the write tokens are dropped: these are not part of the text.
        x, _, _ = block(x, states, segment)
    alone = Segment.from_document_starts(torch.zeros_like(position), num_tokens)
    has_ended = (position % memory_tokens.interval == 0)[:, None, None]
    updated = []
    for block, states, index in zip(blocks, layers, memory_tokens.memory_indices, strict=True):
        present = states[index].hidden
        hidden = torch.where(has_ended, block.attention_norm(x).to(present.dtype), present)
        updated.append((*states[:index], TokenState(hidden), *states[index + 1 :]))
        x, _, _ = block(x, (block.attention.memory.init_state(batch_size, like=x),), alone)
    return tuple(updated)
