"""Reading with a cache of another length than in training, as Transformer-XL is tested (Dai et al. 2019, section 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import Memory
from memtx.memory.recurrent import RecurrentMemory


def set_memory_length(
    model: nn.Module,
    memory_length: int | None = None,
    *,
    clamp_length: int | None = None,
    same_length: bool | None = None,
) -> None:
    """Change what the layers of a model read; states of another length no longer fit it.

    Args:
        model: :class:`memtx.TransformerXL`, or a model whose only memories are ``RecurrentMemory``.
        memory_length: Number of hidden states carried per layer, or exact positions of a ``RecurrentMemory``. None
            keeps each layer's.
        clamp_length: Largest distance that is told apart by a Transformer-XL; 0 or less for no limit. None keeps it.
        same_length: If True, every query sees equally many positions; None keeps the layers' setting.

    Raises:
        MemtxError: The model has other memories, or no layer with a ``clamp_length``, or ``memory_length`` is too low.
    """
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    for memory in memories if memory_length is not None or same_length is not None else ():
        if not isinstance(memory, RecurrentMemory) or not memory.is_resizable:
            message = f"The memory length was given, but a layer has a {type(memory).__name__}."
            raise MemtxError(message, "Remove eval_memory and same_length, or use TransformerXL or RecurrentMemory.")
        same = memory.same_length if same_length is None else same_length
        window = memory.window if memory_length is None else memory_length
        check_at_least(1 if same else 0, memory_length=window)
        memory.set_window(window, same)
    if clamp_length is not None:
        clamped = [module for module in model.modules() if isinstance(getattr(module, "clamp_length", None), int)]
        if not clamped:
            message = f"clamp_length ({clamp_length}) was given, but no layer has relative positions to clamp."
            raise MemtxError(message, "Remove clamp, or use TransformerXL.")
        for module in clamped:
            vars(module)["clamp_length"] = clamp_length


@contextlib.contextmanager
def memory_length(
    model: nn.Module, length: int | None, *, clamp_length: int | None, same_length: bool | None
) -> Iterator[None]:
    """Read with other settings in the context; arguments as in :func:`set_memory_length`."""
    names = ("window", "same_length", "depends_on_segmentation", "cache_length", "clamp_length")
    changed = [module for module in model.modules() if any(name in vars(module) for name in names)]
    saved = [(module, {name: value for name, value in vars(module).items() if name in names}) for module in changed]
    try:
        set_memory_length(model, length, clamp_length=clamp_length, same_length=same_length)
        yield
    finally:
        for module, values in saved:
            vars(module).update(values)
