"""Windows that grow from layer to layer, with memories in chosen layers: the short form of a list of memories."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from memtx.class_config import factory_target
from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ReadoutMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.layer_factories import MemoryFactory

WINDOW_OPTIONS = ("window", "exclude_recent")
"""Options of memories that :class:`GrowingWindows` sets to the layer's window."""


class GrowingWindows:
    """Exact windows that double from layer to layer (cf. Longformer, Beltagy et al. 2020, section 4.1).

    The model's config stores the list that this stands for.

    Args:
        window: Exact positions visible in the last layer.
        min_window: Smallest window.
        memories: Factories of the memories of the chosen layers, given dim. One that carries the segment itself, such
            as ``CompressedMemory``, replaces the window there; others stand beside it. Their ``window`` and
            ``exclude_recent`` are set to the layer's window; if ``near_window`` is given, it is set instead of both.
        layers: Layers that get the memories, from 0, negative from the end. Defaults to the last.
        every_n_layers: If given, every n-th layer, counted from the last, gets the memories instead.

    Raises:
        MemtxError: A number is out of range.
    """

    def __init__(
        self,
        window: int = 512,
        min_window: int = 16,
        memories: Sequence[MemoryFactory] = (),
        layers: Sequence[int] = (-1,),
        every_n_layers: int | None = None,
    ) -> None:
        check_at_least(1, window=window, min_window=min_window)
        check_at_least(1, every_n_layers=1 if every_n_layers is None else every_n_layers)
        if min_window > window:
            raise MemtxError(f"min_window is {min_window}, window {window}.", "Give a min_window of at most window.")
        self.window, self.min_window, self.memories = window, min_window, tuple(memories)
        self.layers, self.every_n_layers = tuple(layers), every_n_layers

    def expand(self, depth: int) -> list[list[MemoryFactory]]:
        """Return the memory factories of each of ``depth`` layers."""
        if wrong := [layer for layer in self.layers if not -depth <= layer < depth]:
            message = f"layers names {wrong[0]}, but there are {depth} layers."
            raise MemtxError(message, f"Give {-depth} to {depth - 1}.")
        chosen = {layer % depth for layer in self.layers}
        if self.every_n_layers is not None:
            chosen = set(range(depth - 1, -1, -self.every_n_layers))
        windows = [max(self.min_window, self.window >> (depth - 1 - layer)) for layer in range(depth)]
        return [self._stack(window, layer in chosen) for layer, window in enumerate(windows)]

    def _stack(self, window: int, has_memories: bool) -> list[MemoryFactory]:
        memories = [_with_window(factory, window) for factory in self.memories] if has_memories else []
        exact = [factory for factory in memories if not _has_readout(factory)]
        extra = [factory for factory in memories if _has_readout(factory)]
        return [*(exact or [functools.partial(RecurrentMemory, window=window)]), *extra]


def expand_memories(memories: Any, depth: int) -> Any:
    """Return a model's memories as a list, given that or :class:`GrowingWindows` or its factory."""
    if isinstance(memories, functools.partial) and factory_target(memories) is GrowingWindows:
        memories = memories()
    return memories.expand(depth) if isinstance(memories, GrowingWindows) else memories


def _has_readout(factory: MemoryFactory) -> bool:
    target = factory_target(factory)
    return inspect.isclass(target) and issubclass(target, ReadoutMemory)


def _with_window(factory: MemoryFactory, window: int) -> MemoryFactory:
    """Return the factory with the options that tell the layer's window."""
    accepted = inspect.signature(factory_target(factory)).parameters
    options: dict[str, Any] = {name: window for name in WINDOW_OPTIONS if name in accepted}
    if isinstance(factory, functools.partial) and factory.keywords.get("near_window") is not None:
        options = {"near_window": window}
    return functools.partial(factory, **options) if options else factory
