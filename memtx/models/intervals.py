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
from memtx.memory.tokens import TokenMemory, TokenState
from memtx.segment import Segment
from memtx.state import MemoryState

Layers = tuple[tuple[Any, ...], ...]
Through = Callable[[Tensor, Layers, Segment], tuple[list[Tensor], Layers, Losses]]

LONGEST = 4096
"""Tokens of all rows read at once on the CPU without a gradient: what a layer makes of them stays in the cache."""

SHORTEST = 1024
"""Tokens a row of such a part at least: every part projects the layers' whole caches anew."""


@dataclass(frozen=True)
class Tokens:
    """A model's memory tokens.

    Attributes:
        places: where in each layer's stack they stand.
        count: how many.
        interval: tokens of a document after which they are written.
    """

    places: tuple[int, ...]
    count: int
    interval: int

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Tokens | None:
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
        settings = {(one.count, one.interval) for layer in found for _, one in layer}
        if any(len(layer) != 1 for layer in found) or len(settings) != 1:
            raise MemtxError(
                "Memory tokens go through all layers, but not all have one TokenMemory of equal settings.",
                "Give one stack for all layers.",
            )
        return cls(tuple(layer[0][0] for layer in found), *settings.pop())


def parts_of(segment: Segment, blocks: Sequence[Block]) -> list[int]:
    """Return the ticks at which the parts end that a call is read in; none for it whole.

    Args:
        segment: where the call's tokens stand.
        blocks: the layers.
    """
    memories = [memory for block in blocks for memory in block.attention.memories]
    late = {memory.interval for memory in memories if memory.depends_on in ("output", "top")}
    if borders := sorted({tick for interval in late if interval is not None for tick in segment.cut(interval)}):
        return borders
    rows, length = segment.position.shape
    if segment.stop is not None:  # Of kinds without borders; how long the call is, its caller decided.
        return []
    part = max(LONGEST // rows, SHORTEST)
    if length <= part or segment.position.device.type != "cpu":
        return []
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(memory.cut_matters for memory in memories):
        return []
    return [*range(part, length, part), length]


def in_parts(
    through: Through,
    stops: Sequence[int],
    x: Tensor,
    state: MemoryState,
    starts: Tensor | None,
    between: Callable[[Layers, Tensor], Layers] | None = None,
) -> tuple[list[Tensor], Layers, Losses]:
    """Read a call part after part.

    Args:
        through: reads one part: from its inputs, the states and its places to outputs, states and losses.
        stops: the ticks at which parts end, the call's end the last.
        x: (rows, segment, dim), embedded.
        state: as the call found it.
        starts: (rows, segment) bool, where documents begin; None for nowhere.
        between: changes the states after each part, given them and (rows,) the tokens read so far.

    Returns:
        what ``through`` gives for the whole call; losses weigh by the parts' lengths.
    """
    layers, position, begin = state.layers, state.position, 0
    parts: list[list[Tensor]] = []
    losses: Losses = {}
    for stop in stops:
        own = Segment.locate(position, stop - begin, None if starts is None else starts[:, begin:stop])
        hidden, layers, found = through(x[:, begin:stop], layers, own)
        position = own.next_position
        if between is not None:
            layers = between(layers, position)
        parts.append(hidden)
        for name, value in found.items():
            share = value * ((stop - begin) / x.shape[1])
            losses[name] = losses[name] + share if name in losses else share
        begin = stop
    return [torch.cat(one, dim=1) for one in zip(*parts, strict=True)], layers, losses


def by_intervals(
    through: Through,
    blocks: Sequence[Block],
    tokens: Tokens,
    asking: Tensor,
    stops: Sequence[int],
    x: Tensor,
    state: MemoryState,
    starts: Tensor | None,
) -> tuple[list[Tensor], Layers, Losses]:
    """Read a call up to a border of any row at a time, and write the memory tokens there.

    Args:
        through: as for :func:`in_parts`, as are stops, x, state and starts.
        blocks: the layers.
        tokens: the settings.
        asking: (count, dim), the tokens that ask what to remember.
        stops: ticks, the borders among them.
        x: (rows, segment, dim).
        state: a value.
        starts: (rows, segment) bool, or None.
    """

    def between(layers: Layers, position: Tensor) -> Layers:
        # At no border too, where nothing is changed by it: shapes, and so the work, are the same.
        return _remembered(blocks, tokens, asking, layers, position)

    hidden, layers, losses = in_parts(through, stops, x, state, starts, between)
    # What was asked for is read after the border, maybe in no call of the horizon; DDP wants a gradient all the
    # same, which is zero then.
    hidden[-1] = hidden[-1] + 0.0 * asking.sum()
    return hidden, layers, losses


def _remembered(blocks: Sequence[Block], tokens: Tokens, asking: Tensor, layers: Layers, position: Tensor) -> Layers:
    """Return the layers' states with new memory tokens in the rows whose interval has just ended."""
    rows, count = position.shape[0], asking.shape[0]
    x = asking.expand(rows, -1, -1)
    after = Segment.locate(position, count)
    for block, own in zip(blocks, layers, strict=True):
        # What the asking tokens leave in the memories is forgotten: they are not of the text.
        x, _, _ = block(x, own, after)
    alone = Segment.locate(torch.zeros_like(position), count)
    ended = (position % tokens.interval == 0)[:, None, None]
    changed = []
    for block, own, place in zip(blocks, layers, tokens.places, strict=True):
        hidden = torch.where(ended, block.attention_norm(x).to(own[place].hidden.dtype), own[place].hidden)
        changed.append((*own[:place], TokenState(hidden), *own[place + 1 :]))
        exact = block.attention.memory
        x, _, _ = block(x, (exact.init_state(rows, like=x),), alone)
    return tuple(changed)
