"""Reading a call in parts: long ones in pieces that stay in the cache, and memory tokens by intervals.

Memory tokens are written from the top of the stack and read at its bottom, so their calls are read up to the next
border of any row at a time. There the asking tokens of all rows go through the layers after the interval, and what
they become goes through the layers alone, before the next one; rows that stand at no border keep what they had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
RunLayers = Callable[[Tensor, LayerStates, Segment], tuple[list[Tensor], LayerStates, Losses]]

MAX_CHUNK_TOKENS = 4096
"""Tokens of all rows read at once on the CPU without a gradient: what a layer makes of them stays in the cache."""

MIN_CHUNK_LENGTH = 1024
"""Tokens a row of such a part at least: every part projects the layers' whole caches anew."""


@dataclass(frozen=True)
class MemoryTokens:
    """A model's memory tokens.

    Attributes:
        memory_indices: where in each layer's stack they stand.
        num_tokens: how many.
        interval: tokens of a document after which they are written.
    """

    memory_indices: tuple[int, ...]
    num_tokens: int
    interval: int

    @classmethod
    def from_blocks(cls, blocks: Sequence[Block]) -> MemoryTokens | None:
        """Return what the layers have of them; None for a model without.

        Raises:
            MemtxError: some layers have them and others not, or with other settings.
        """
        found = [
            [(place, one) for place, one in enumerate(block.attention.memories) if isinstance(one, TokenMemory)]
            for block in blocks
        ]
        if not any(found):
            return None
        settings = {(one.num_tokens, one.interval) for layer in found for _, one in layer}
        if any(len(layer) != 1 for layer in found) or len(settings) != 1:
            raise MemtxError(
                "Memory tokens go through all layers, but not all have one TokenMemory of equal settings.",
                "Give one stack for all layers.",
            )
        return cls(tuple(layer[0][0] for layer in found), *settings.pop())


def find_chunk_ends(segment: Segment, blocks: Sequence[Block]) -> list[int]:
    """Return the offsets at which the parts end that a call is read in; none for it whole.

    Args:
        segment: where the call's tokens stand.
        blocks: the layers.
    """
    memories = [memory for block in blocks for memory in block.attention.memories]
    late = {memory.interval for memory in memories if memory.needs_layer_output or isinstance(memory, TokenMemory)}
    if borders := sorted(
        {tick for interval in late if interval is not None for tick in segment.split_offsets(interval)}
    ):
        return borders
    rows, length = segment.position.shape
    if segment.valid_length is not None:  # Of kinds without borders; how long the call is, its caller decided.
        return []
    part = max(MAX_CHUNK_TOKENS // rows, MIN_CHUNK_LENGTH)
    if length <= part or segment.position.device.type != "cpu":
        return []
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(memory.depends_on_segmentation for memory in memories)
    ):
        return []
    return [*range(part, length, part), length]


def forward_in_chunks(
    run_layers: RunLayers,
    chunk_ends: Sequence[int],
    x: Tensor,
    state: MemoryState,
    document_starts: Tensor | None,
    after_chunk: Callable[[LayerStates, Tensor], LayerStates] | None = None,
) -> tuple[list[Tensor], LayerStates, Losses]:
    """Read a call part after part.

    Args:
        run_layers: reads one part: from its inputs, the states and its places to outputs, states and losses.
        chunk_ends: the offsets at which parts end, the call's end the last.
        x: (rows, segment, dim), embedded.
        state: as the call found it.
        document_starts: (rows, segment) bool, where documents begin; None for nowhere.
        after_chunk: changes the states after each part, given them and (rows,) the tokens read so far.

    Returns:
        what ``run_layers`` gives for the whole call; losses weigh by the parts' lengths.
    """
    layers, position, begin = state.layers, state.position, 0
    parts: list[list[Tensor]] = []
    losses: Losses = {}
    for stop in chunk_ends:
        own = Segment.from_document_starts(
            position, stop - begin, None if document_starts is None else document_starts[:, begin:stop]
        )
        hidden, layers, found = run_layers(x[:, begin:stop], layers, own)
        position = own.next_position
        if after_chunk is not None:
            layers = after_chunk(layers, position)
        parts.append(hidden)
        for name, value in found.items():
            share = value * ((stop - begin) / x.shape[1])
            losses[name] = losses[name] + share if name in losses else share
        begin = stop
    return [torch.cat(one, dim=1) for one in zip(*parts, strict=True)], layers, losses


def forward_with_memory_tokens(
    run_layers: RunLayers,
    blocks: Sequence[Block],
    memory_tokens: MemoryTokens,
    write_tokens: Tensor,
    chunk_ends: Sequence[int],
    x: Tensor,
    state: MemoryState,
    document_starts: Tensor | None,
) -> tuple[list[Tensor], LayerStates, Losses]:
    """Read a call up to a border of any row at a time, and write the memory tokens there.

    Args:
        run_layers: as for :func:`forward_in_chunks`, as are chunk_ends, x, state and document_starts.
        blocks: the layers.
        memory_tokens: the settings.
        write_tokens: (count, dim), the tokens that ask what to remember.
        chunk_ends: offsets, the borders among them.
        x: (rows, segment, dim).
        state: a value.
        document_starts: (rows, segment) bool, or None.
    """

    def between(layers: LayerStates, position: Tensor) -> LayerStates:
        # At no border too, where nothing is changed by it: shapes, and so the work, are the same.
        return _update_memory_tokens(blocks, memory_tokens, write_tokens, layers, position)

    hidden, layers, losses = forward_in_chunks(run_layers, chunk_ends, x, state, document_starts, between)
    # What was asked for is read after the border, maybe in no call of the horizon; DDP wants a gradient all the
    # same, which is zero then.
    hidden[-1] = hidden[-1] + 0.0 * write_tokens.sum()
    return hidden, layers, losses


def _update_memory_tokens(
    blocks: Sequence[Block], memory_tokens: MemoryTokens, write_tokens: Tensor, layers: LayerStates, position: Tensor
) -> LayerStates:
    """Return the layers' states with new memory tokens in the rows whose interval has just ended."""
    rows, count = position.shape[0], write_tokens.shape[0]
    x = write_tokens.expand(rows, -1, -1)
    after = Segment.from_document_starts(position, count)
    for block, own in zip(blocks, layers, strict=True):
        # What the asking tokens leave in the memories is forgotten: they are not of the text.
        x, _, _ = block(x, own, after)
    alone = Segment.from_document_starts(torch.zeros_like(position), count)
    ended = (position % memory_tokens.interval == 0)[:, None, None]
    changed = []
    for block, own, place in zip(blocks, layers, memory_tokens.memory_indices, strict=True):
        hidden = torch.where(ended, block.attention_norm(x).to(own[place].hidden.dtype), own[place].hidden)
        changed.append((*own[:place], TokenState(hidden), *own[place + 1 :]))
        exact = block.attention.memory
        x, _, _ = block(x, (exact.init_state(rows, like=x),), alone)
    return tuple(changed)
