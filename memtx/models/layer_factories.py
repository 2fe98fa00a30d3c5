"""Layers built from factories: one for all layers, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

from torch import nn

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.block import Block
from memtx.layers.positions.base import Positions
from memtx.layers.token_mixer import StandaloneMemory, TokenMixer
from memtx.memory.base import Memory

T = TypeVar("T")

NormPlacement = Literal["pre", "post", "sandwich", "residual"]
"""Position of a layer's norms: before its parts, after them, both, or after the sums with their inputs."""

FeedForwardFactory = Callable[[int], nn.Module]
"""Returns a layer's feed-forward part, given dim."""

PositionsFactory = Callable[[int, int], Positions]
"""Returns a layer's position encoding, given (heads, head_dim)."""

MemoryFactory = Callable[[int], Memory[Any]]
"""Returns a layer's memory, given dim.

In a union it follows its sequence: jsonargparse tries the members in order and would accept a list as a callable.
"""


def build_block(
    dim: int,
    stack: Sequence[MemoryFactory],
    attention: Callable[..., MemoryAttention],
    positions: Callable[[], Positions],
    feed_forward: FeedForwardFactory,
    norm: Callable[[int], nn.Module],
    norm_placement: NormPlacement,
    dropout: float,
) -> Block:
    """Return a layer with the memories of a stack, the attention being replaced if the first stands alone."""
    memories = [factory(dim) for factory in stack]
    if norm_placement not in get_args(NormPlacement):
        raise MemtxError(f"norm_placement is {norm_placement!r}.", f"Give one of {', '.join(get_args(NormPlacement))}.")
    if not isinstance(memories[0], StandaloneMemory):
        mixer: MemoryAttention | TokenMixer = attention(memories[0], positions(), extra_memories=memories[1:])
    elif len(memories) == 1:
        mixer = TokenMixer(memories[0])
    else:
        message = f"{type(memories[0]).__name__} replaces attention but has other memories beside it."
        raise MemtxError(message, "Give it a layer of its own.")
    pre, post, residual = (
        [norm(dim) if norm_placement in placements else None for _ in range(2)]
        for placements in (("pre", "sandwich"), ("post", "sandwich"), ("residual",))
    )
    return Block(mixer, feed_forward(dim), pre[0] or nn.Identity(), pre[1] or nn.Identity(), dropout, *post, *residual)


def per_layer(name: str, value: Sequence[T] | T, depth: int) -> Sequence[T]:
    """Return an option's values by layer; a value that is not a list is that of all layers."""
    values = cast("Sequence[T]", value if isinstance(value, list | tuple) else [value] * depth)
    if len(values) != depth:
        raise MemtxError(f"There are {len(values)} {name} for {depth} layers.", f"Give one for all layers, or {depth}.")
    return values


def memory_stacks(
    memories: Sequence[Sequence[MemoryFactory] | MemoryFactory], depth: int
) -> list[Sequence[MemoryFactory]]:
    """Return the memory factories of each layer."""
    if len(memories) not in (1, depth):
        message = f"There are {len(memories)} memories for {depth} layers."
        raise MemtxError(message, f"Give one for all layers, or {depth}.")
    stacks = [memory if isinstance(memory, Sequence) else [memory] for memory in memories]
    if not all(stacks):
        raise MemtxError("A layer's list of memories is empty.", "Give NoMemory for a layer without memory.")
    return stacks if len(stacks) == depth else stacks * depth
