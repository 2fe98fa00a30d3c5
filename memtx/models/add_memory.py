"""Memories put into the layers of a model that was trained without: a window, sinks, and what is added to some."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn

from memtx import class_config
from memtx.errors import MemtxError, check_at_least
from memtx.hf.layout import HFCompatibleModel
from memtx.layers.block import Block
from memtx.memory.base import Memory, ReadoutMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.sinks import SinkMemory
from memtx.models.segmented_forward import MemoryTokens

MemoryFactory = Callable[[int], Memory[Any]]
"""Makes a layer's memory from the width of the hidden states.

In a union it stands behind its sequence: jsonargparse tries in order, and would take a list for a callable.
"""


@dataclass(frozen=True)
class MemoryStack:
    """A layer's memories.

    Attributes:
        factories: what makes them, the exact one first.
        memories: made.
    """

    factories: list[MemoryFactory]
    memories: list[Memory[Any]]


def build_stacks(
    blocks: Sequence[Block],
    memories: Sequence[MemoryFactory],
    window: int | None,
    num_sinks: int,
    layers: Sequence[int] | None,
) -> list[MemoryStack]:
    """Return each layer's new memories; arguments as of ``MemoryTransformer.with_memory``.

    Raises:
        MemtxError: a number is out of range, or more than one memory would carry the segment itself.
    """
    check_at_least(0, num_sinks=num_sinks)
    if window is not None:
        check_at_least(1, window=window)
    chosen = _resolve_layers(layers, len(blocks))
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
        stacks.append(_build_stack(exact.dim, kept, num_sinks, memories if layer in chosen else ()))
    return stacks


def _resolve_layers(layers: Sequence[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    for layer in layers:
        if not -depth <= layer < depth:
            raise MemtxError(f"layers names {layer}, the model has {depth}.", f"Give {-depth} to {depth - 1}.")
    return {layer % depth for layer in layers}


def _build_stack(dim: int, window: int, num_sinks: int, memories: Sequence[MemoryFactory]) -> MemoryStack:
    added = [make(dim) for make in memories]
    carrying = [place for place, one in enumerate(added) if not isinstance(one, ReadoutMemory)]
    if len(carrying) > 1:
        raise MemtxError("Two memories would carry the segment itself.", "Give one such as CompressedMemory.")
    makers: list[MemoryFactory] = list(memories)
    if carrying:
        makers.insert(0, makers.pop(carrying[0]))
        added.insert(0, added.pop(carrying[0]))
    else:
        makers.insert(0, partial(RecurrentMemory, window=window))
        added.insert(0, makers[0](dim))
    if num_sinks:
        # An exact state may be seen up to a block longer than the window.
        cached = added[0].cache_length if isinstance(added[0], CompressedMemory) else window
        makers.insert(
            1,
            partial(SinkMemory, num_sinks=num_sinks, exclude_recent=cached, use_positions=True),
        )
        added.insert(1, makers[1](dim))
    return MemoryStack(makers, added)


class MemoryAugmentedModel(HFCompatibleModel):
    """A model whose layers' memories can be exchanged.

    Attributes:
        dim: width of the hidden states.
        embedding: of the tokens.
        blocks: the layers.
        memory_tokens: the memory tokens that the layers have; None for none.
        write_tokens: (count, dim), what these begin as, where there are any.
    """

    dim: int
    embedding: nn.Embedding
    blocks: nn.ModuleList
    memory_tokens: MemoryTokens | None
    write_tokens: nn.Parameter

    def with_memory(
        self,
        memories: Sequence[MemoryFactory] | MemoryFactory = (),
        *,
        window: int | None = None,
        num_sinks: int = 4,
        layers: Sequence[int] | None = None,
        gated_memory: bool = True,
    ) -> Self:
        """Return a model of the same weights, shared with this one, with a window, sinks and other memories.

        Args:
            memories: added to the chosen layers, made from dim. One that carries the segment itself, such as
                ``CompressedMemory``, takes the window's place there.
            window: exact positions seen; None for as many as each layer sees now, which is also the most.
            num_sinks: first tokens of the document that every layer goes on seeing; 0 for none.
            layers: which get the memories, from 0, negative from the end; None for all.
            gated_memory: whether memories enter by gates that begin at 0, so that what is computed changes with
                training.

        Raises:
            MemtxError: a number is out of range, or a memory cannot stand where it is put.
        """
        given = list(memories) if isinstance(memories, Sequence) else [memories]
        stacks = build_stacks(self._layers(), given, window, num_sinks, layers)
        made = self._copy_with_shared_weights()
        weight = self.embedding.weight
        for block, stack in zip(made._layers(), stacks, strict=True):
            block.attention.set_memories(stack.memories[0], stack.memories[1:], gated_memory=gated_memory)
        made._init_memory_tokens()
        if made.memory_tokens is not None:
            nn.init.normal_(made.write_tokens, std=0.02)
        made.to(weight.device, weight.dtype)
        made._update_init_args([class_config.to_config(stack.factories) for stack in stacks], gated_memory)
        return made.train(self.training)

    def without_memory(self, window: int) -> Self:
        """Return a model of the same weights, shared with this one, that sees ``window`` positions exactly.

        Raises:
            MemtxError: the window is not positive.
        """
        makers = [partial(RecurrentMemory, window=window)]
        made = self._copy_with_shared_weights()
        for block in made._layers():
            block.attention.set_memories(makers[0](self.dim), [], gated_memory=False)
        made.memory_tokens = None
        made._update_init_args(class_config.to_config(makers), gated_memory=False)
        return made

    def _update_init_args(self, memories: Any, gated_memory: bool) -> None:
        """Take down what the layers have now, as the model's description says it."""
        arguments = {**self.config["init_args"], "memories": memories, "gated_memory": gated_memory}
        self.config = {**self.config, "init_args": arguments}

    def _copy_with_shared_weights(self) -> Self:
        """Return a copy of the modules that has this one's numbers themselves."""
        return copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})

    def memory_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name what belongs to the memories: their own parameters, gates, and tokens that ask."""
        parts = (".attention.memory.", ".attention.extra_memories.", ".attention.gate")
        named = self.named_parameters()
        return {name: one for name, one in named if name == "write_tokens" or any(part in name for part in parts)}

    def _init_memory_tokens(self) -> None:
        """Take down what the layers have of memory tokens, and make the tokens that ask for them."""
        self.memory_tokens = MemoryTokens.from_blocks(self._layers())
        if self.memory_tokens is not None:
            self.write_tokens = nn.Parameter(torch.empty(self.memory_tokens.num_tokens, self.dim))

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))
