"""Windows that grow from layer to layer, and from phase to phase of training.

:class:`GrowingWindows` is the short form of a list of memories; :func:`scale_windows` changes those of a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from memtx import class_config
from memtx.class_config import factory_target
from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ReadoutMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.layer_factories import MemoryFactory, memory_stacks, per_layer

if TYPE_CHECKING:
    from memtx.models.memory_transformer import MemoryTransformer

WINDOW_OPTIONS = ("window", "exclude_recent")
"""Options of memories that :class:`GrowingWindows` sets to the layer's window."""


class GrowingWindows:
    """Exact windows that double from layer to layer (cf. Longformer, Beltagy et al. 2020, section 4.1).

    The model's config stores the list that this stands for.

    Args:
        window: Exact positions visible in the last layer, or a list of those in each layer.
        min_window: Smallest window.
        memories: Factories of the memories of the chosen layers, given dim. One that carries the segment itself, such
            as ``CompressedMemory``, replaces the window there; others stand beside it. Their ``window`` and
            ``exclude_recent`` are set to the layer's window; if ``near_window`` is given, it is set instead of both.
        layers: Layers that get the memories, from 0, negative from the end. Defaults to the last.
        every_n_layers: If given, every n-th layer, counted from the last, gets the memories instead.
        dilations: The ``dilation`` of each layer's :class:`~memtx.memory.recurrent.RecurrentMemory`. Longformer dilates
            a few heads of the upper layers, such as ``[1, 1, [2, 2], [3, 3]]``. Defaults to 1 in all.

    Raises:
        MemtxError: A number is out of range, or a list has not one entry per layer.
    """

    def __init__(
        self,
        window: Sequence[int] | int = 512,
        min_window: int = 16,
        memories: Sequence[MemoryFactory] = (),
        layers: Sequence[int] = (-1,),
        every_n_layers: int | None = None,
        dilations: Sequence[Sequence[int] | int] = (),
    ) -> None:
        windows = [window] if isinstance(window, int) else list(window)
        for size in windows:
            check_at_least(1, window=size, min_window=min_window)
        check_at_least(1, every_n_layers=1 if every_n_layers is None else every_n_layers)
        if isinstance(window, int) and min_window > window:
            raise MemtxError(f"min_window is {min_window}, window {window}.", "Give a min_window of at most window.")
        self.window, self.min_window, self.memories = window, min_window, tuple(memories)
        self.layers, self.every_n_layers, self.dilations = tuple(layers), every_n_layers, tuple(dilations)

    def expand(self, depth: int) -> list[list[MemoryFactory]]:
        """Return the memory factories of each of ``depth`` layers."""
        if wrong := [layer for layer in self.layers if not -depth <= layer < depth]:
            message = f"layers names {wrong[0]}, but there are {depth} layers."
            raise MemtxError(message, f"Give {-depth} to {depth - 1}.")
        chosen = {layer % depth for layer in self.layers}
        if self.every_n_layers is not None:
            chosen = set(range(depth - 1, -1, -self.every_n_layers))
        windows: Sequence[int]
        if isinstance(self.window, int):
            windows = [max(self.min_window, self.window >> (depth - 1 - layer)) for layer in range(depth)]
        else:
            windows = per_layer("windows", list(self.window), depth)
        dilations: Sequence[Sequence[int] | int] = per_layer("dilations", list(self.dilations) or [1] * depth, depth)
        stacks = [self._stack(window, layer in chosen) for layer, window in enumerate(windows)]
        for stack, dilation in zip(stacks, dilations, strict=True):
            if dilation == 1:
                continue
            if "dilation" not in inspect.signature(factory_target(stack[0])).parameters:
                message = f"dilations has {dilation} for a layer with {factory_target(stack[0]).__name__}."
                raise MemtxError(message, "Give 1 there; RecurrentMemory can be dilated.")
            options: dict[str, Any] = {"dilation": dilation}
            stack[0] = functools.partial(stack[0], **options)
        return stacks

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


def scale_windows(model: MemoryTransformer, memories: Any, factor: float) -> None:
    """Multiply the windows of a model's memories in place, and note them in its config.

    States of the former windows do not fit; weights stay the same. The options are those that
    :class:`GrowingWindows` sets.

    Args:
        model: The model, whose config has ``memories``.
        memories: The config of its memories to scale, from ``model.config["init_args"]``.
        factor: Factor of the windows that ``memories`` has, which are rounded down, to at least 1.

    Raises:
        MemtxError: A window does not fit another option of its memory.
    """
    scaled = _scale_config(memories, factor)
    for block, stack in zip(model._layers(), memory_stacks(class_config.from_config(scaled), model.depth), strict=True):
        for memory, factory in zip(block.attention.memories, stack, strict=True):
            with torch.device("meta"):
                attributes = vars(factory(model.dim))
            # Weights, submodules and buffers, which begin with an underscore, stay.
            settings = {name: value for name, value in attributes.items() if not name.startswith("_")}
            vars(memory).update(settings | {"training": memory.training})
    model.config["init_args"]["memories"] = scaled


def _scale_config(config: Any, factor: float) -> Any:
    """Return the config of memories with scaled windows."""
    if isinstance(config, list):
        return [_scale_config(entry, factor) for entry in config]
    accepted = inspect.signature(factory_target(class_config.from_config(config))).parameters
    options = config["init_args"]
    names = ["near_window"] if options.get("near_window") is not None else WINDOW_OPTIONS
    windows = {name: options.get(name, accepted[name].default) for name in names if name in accepted}
    scaled = {name: max(1, int(window * factor)) for name, window in windows.items()}
    return {**config, "init_args": options | scaled}
