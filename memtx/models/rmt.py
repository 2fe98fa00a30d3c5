"""Segments with memory tokens, as RMT and ARMT have them: tokens before and after a segment go through all layers.

A call is cut where a segment of any stream begins or ends. Streams in the middle of a segment keep their states there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.errors import MemtxError
from memtx.layers.block import Block
from memtx.memory.base import Losses
from memtx.memory.rmt import ARMTMemory, ReadTokens, SegmentMemory, WriteTokens
from memtx.models.segmented_forward import LayerStates, TokenParts
from memtx.segment import Segment
from memtx.state import MemoryState


@dataclass(frozen=True)
class SegmentTokens:
    """Memory tokens of a model whose layers have a :class:`~memtx.memory.rmt.SegmentMemory`.

    Attributes:
        num_tokens: Number of tokens.
        num_read_tokens: Number of them before a segment, 0 or all.
        interval: Tokens of a document in a segment.
    """

    num_tokens: int
    num_read_tokens: int
    interval: int

    @classmethod
    def from_blocks(cls, blocks: Sequence[Block]) -> SegmentTokens | None:
        """Return the memory tokens of the layers, or None; raises MemtxError unless all layers have the same."""
        stacks = [block.attention.memories for block in blocks]
        if not any(isinstance(memory, SegmentMemory) for stack in stacks for memory in stack):
            return None
        first = stacks[0][0]
        settings = {(type(stack[0]), stack[0].interval, stack[0].extra_repr(), len(stack)) for stack in stacks}
        if not isinstance(first, SegmentMemory) or len(settings) != 1 or len(stacks[0]) != 1:
            message = "Memory tokens go through all layers, but not all have one equal RMTMemory or ARMTMemory alone."
            raise MemtxError(message, "Give one memory for all layers; with_memory needs num_sinks=0.")
        return cls(first.num_tokens, first.num_read_tokens, first.interval)

    def find_chunk_ends(self, segment: Segment) -> list[int]:
        """Return the offsets at which a segment of any stream ends, or a document's first one begins, and the end."""
        ends = segment.split_offsets(self.interval)
        if segment.length > 1 and segment.has_document_starts:
            first_tokens: list[int] = (segment.position == 0).any(0).nonzero().flatten().tolist()
            ends = sorted({*ends, *first_tokens} - {0})
        return ends

    def input_position(self, position: Tensor) -> Tensor:
        """Return the position within [read tokens | segment | write tokens] of positions in the document."""
        return self.num_read_tokens + position % self.interval

    def forward(
        self, parts: TokenParts, segment: Segment, x: Tensor, state: MemoryState, document_starts: Tensor | None
    ) -> tuple[list[Tensor], LayerStates, Losses]:
        """Read a call; arguments and results as in :func:`~memtx.models.segmented_forward.forward_in_chunks`."""
        layers, position, start = state.layers, state.position, 0
        chunks: list[list[Tensor]] = []
        losses: Losses = {}
        for end in self.find_chunk_ends(segment):
            if document_starts is not None:
                position = position.masked_fill(document_starts[:, start], 0)
            layers = self._begin_segments(parts, layers, position)
            chunk = Segment.from_document_starts(position % self.interval, end - start)
            hidden, layers, chunk_losses = parts.run_layers(x[:, start:end], layers, chunk)
            position = position + (end - start)
            layers = self._end_segments(parts, layers, position)
            chunks.append(hidden)
            for name, loss in chunk_losses.items():
                losses[name] = losses.get(name, loss.new_zeros(())) + loss * ((end - start) / x.shape[1])
            start = end
        joined = [torch.cat(pieces, dim=1) for pieces in zip(*chunks, strict=True)]
        # What no later call reads has no gradient; DDP needs one, which is then zero.
        memories = [parameter for block in parts.blocks for parameter in block.attention.memory.parameters()]
        joined[-1] = joined[-1] + 0.0 * sum(parameter.sum() for parameter in (parts.tokens, *memories))
        return joined, layers, losses

    def _begin_segments(self, parts: TokenParts, layers: LayerStates, position: Tensor) -> LayerStates:
        """Return the states with fresh ones where a document begins, and read tokens where a segment does."""
        begins, is_new = position % self.interval == 0, position == 0
        if not _may_be_true(begins):
            return layers
        like = layers[0][0].hidden
        fresh = tuple((block.attention.memory.init_state(like.shape[0], like=like),) for block in parts.blocks)
        layers = _select(is_new, fresh, layers)
        if not self.num_read_tokens:
            return layers
        stored = layers[0][0].tokens
        tokens = _where(is_new, parts.tokens.to(stored.dtype).expand_as(stored), stored)
        segment = ReadTokens.from_document_starts(torch.zeros_like(position), self.num_tokens)
        x = _embed(tokens, parts, segment.position)
        updated = []
        for block, (layer_state,) in zip(parts.blocks, layers, strict=True):
            x, states, _ = block(x, (replace(layer_state, tokens=tokens),), segment)
            updated.append(states)
        return _select(begins, tuple(updated), layers)

    def _end_segments(self, parts: TokenParts, layers: LayerStates, position: Tensor) -> LayerStates:
        """Return the states with written memory where a segment has just ended."""
        has_ended = position % self.interval == 0
        if not _may_be_true(has_ended):
            return layers
        segment = WriteTokens.from_document_starts(torch.full_like(position, self.interval), self.num_tokens)
        is_rmt = self.num_read_tokens > 0
        tokens = layers[0][0].tokens if is_rmt else parts.tokens.expand(position.shape[0], -1, -1)
        x = _embed(tokens, parts, self.num_read_tokens + segment.position)
        updated: list[tuple[Any, ...]] = []
        for block, states in zip(parts.blocks, layers, strict=True):
            # The states after the memory tokens are dropped: these are not part of the text.
            x, _, _ = block(x, states, segment)
            memory = block.attention.memory
            updated.append((memory.write_tokens(states[0], x),) if isinstance(memory, ARMTMemory) else states)
        if is_rmt:
            written = parts.norm(x).to(tokens.dtype)
            updated = [(replace(layer_state, tokens=written),) for (layer_state,) in updated]
        return _select(has_ended, tuple(updated), layers)


def _may_be_true(mask: Tensor) -> bool:
    """Return False if no element is True, where that is known at once; with gradients all ranks do the same work."""
    if mask.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    return bool(mask.any())


def _embed(tokens: Tensor, parts: TokenParts, position: Tensor) -> Tensor:
    tokens = tokens.to(parts.tokens.dtype)
    return tokens if parts.absolute_positions is None else tokens + parts.absolute_positions(position)


def _where(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *(1,) * (other.dim() - 1)), chosen, other)


def _select(mask: Tensor, chosen: LayerStates, other: LayerStates) -> LayerStates:
    """Return the chosen states in the streams that the mask marks, and the others elsewhere."""
    return cast(LayerStates, pytree.tree_map(lambda *leaves: _where(mask, *leaves), chosen, other))
