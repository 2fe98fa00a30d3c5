"""Which memories the layers of a model get that was trained without: a window, sinks, and what is added to some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from memtx.errors import MemtxError, at_least
from memtx.layers.block import Block
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.sinks import SinkMemory

MakeMemory = Callable[[int], Memory[Any]]
"""Makes a layer's memory from the width of the hidden states.

In a union it stands behind its sequence: jsonargparse tries in order, and would take a list for a callable.
"""


@dataclass(frozen=True)
class Stack:
    """A layer's memories.

    Attributes:
        makers: what makes them, the exact one first.
        memories: made.
    """

    makers: list[MakeMemory]
    memories: list[Memory[Any]]


def stacked(
    blocks: Sequence[Block],
    memories: Sequence[MakeMemory],
    window: int | None,
    sinks: int,
    layers: Sequence[int] | None,
) -> list[Stack]:
    """Return each layer's new memories; arguments as of ``MemoryTransformer.with_memory``.

    Raises:
        MemtxError: a number is out of range, or more than one memory would carry the segment itself.
    """
    at_least(0, sinks=sinks)
    if window is not None:
        at_least(1, window=window)
    chosen = _chosen(layers, len(blocks))
    stacks = []
    for layer, block in enumerate(blocks):
        exact = block.attention.memory
        own = getattr(exact, "window", None)
        if not isinstance(exact, RecurrentMemory | CompressedMemory) or own is None:
            raise MemtxError(
                f"Layer {layer} has {type(exact).__name__}, which has no window to be replaced.",
                "Add memory to a model of RecurrentMemory or CompressedMemory.",
            )
        kept = own if window is None else min(own, window)
        stacks.append(_stack(exact.dim, kept, sinks, memories if layer in chosen else ()))
    return stacks


def _chosen(layers: Sequence[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    for layer in layers:
        if not -depth <= layer < depth:
            raise MemtxError(f"layers names {layer}, the model has {depth}.", f"Give {-depth} to {depth - 1}.")
    return {layer % depth for layer in layers}


def _stack(dim: int, window: int, sinks: int, memories: Sequence[MakeMemory]) -> Stack:
    added = [make(dim) for make in memories]
    carrying = [place for place, one in enumerate(added) if not one.answers]
    if len(carrying) > 1:
        raise MemtxError("Two memories would carry the segment itself.", "Give one such as CompressedMemory.")
    makers: list[MakeMemory] = list(memories)
    if carrying:
        makers.insert(0, makers.pop(carrying[0]))
        added.insert(0, added.pop(carrying[0]))
    else:
        makers.insert(0, partial(RecurrentMemory, window=window))
        added.insert(0, makers[0](dim))
    if sinks:
        # An exact state may be seen up to a block longer than the window.
        makers.insert(1, partial(SinkMemory, count=sinks, skip=getattr(added[0], "cached", window)))
        added.insert(1, makers[1](dim))
    return Stack(makers, added)
