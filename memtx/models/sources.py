"""Sources of a model's predictions beyond its exact window, and copies of the model that read without one of them.

Both read the same texts with the same weights, so the difference of their losses is what the source is worth, without
the noise of two trainings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from torch import nn

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.token_mixer import TokenMixer
from memtx.memory.base import Memory
from memtx.memory.recurrent import RecurrentMemory
from memtx.models.add_memory import copy_with_shared_weights
from memtx.models.memory_transformer import MemoryTransformer

ModelT = TypeVar("ModelT", bound=MemoryTransformer)


def list_sources(model: nn.Module) -> list[str]:
    """Return the names of a model's sources, in the order of its layers, those of the output last.

    They are "bank" for compressed or selected entries, "cache" for a cache beyond the near window, and for other
    memories the class name without "Memory" in lower case, such as "associative" or "copy". The exact window is none.
    """
    return list(_find_sources(model))


def without_source(model: ModelT, source: str) -> ModelT:
    """Return a copy of a model, which shares its weights, that never reads one of its sources.

    The source stays in the state, which fits both models. A memory in place of attention, such as ``GatedDeltaNet``,
    begins every call with a fresh state.

    Raises:
        MemtxError: The model has no source of this name.
    """
    reduced = copy_with_shared_weights(model)
    for memory in _select_memories(reduced, [source]):
        memory.is_hidden = True
    return reduced


@contextlib.contextmanager
def hide_sources(model: nn.Module, sources: Collection[str]) -> Iterator[None]:
    """Hide sources of the model itself in the context, as :func:`without_source` does in a copy."""
    memories = [memory for memory in _select_memories(model, sources) if not memory.is_hidden]
    try:
        for memory in memories:
            memory.is_hidden = True
        yield
    finally:
        for memory in memories:
            memory.is_hidden = False


def _select_memories(model: nn.Module, sources: Collection[str]) -> list[Memory[Any]]:
    available = _find_sources(model)
    for source in sources:
        if source not in available:
            hint = f"Give one of: {', '.join(available)}." if available else "It has an exact window alone."
            raise MemtxError(f"The model has no source '{source}'.", hint)
    return [memory for source in sources for memory in available[source]]


def _find_sources(model: nn.Module) -> dict[str, list[Memory[Any]]]:
    """Return the memories of each source by its name."""
    sources: dict[str, list[Memory[Any]]] = {}
    for module in model.modules():
        if isinstance(module, MemoryAttention):
            if module.memory.has_bank:
                name = "cache" if isinstance(module.memory, RecurrentMemory) else "bank"
                sources.setdefault(name, []).append(module.memory)
            others = module.memories[1:]
        else:
            others = (module.memory,) if isinstance(module, TokenMixer) else ()
        for memory in others:
            sources.setdefault(_class_name(memory), []).append(memory)
    if (output_memory := getattr(model, "output_memory", None)) is not None:
        sources.setdefault(_class_name(output_memory), []).append(output_memory)
    return sources


def _class_name(memory: nn.Module) -> str:
    """Return a memory's class name without "Memory", in snake case."""
    name = type(memory).__name__
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("Memory") or name).lower()
