"""Memory for a model that is already trained, as one part that a YAML file can name."""

from __future__ import annotations

from collections.abc import Sequence

from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.mounting import MakeMemory


def retrofit(
    vocab_size: int,
    folder: str,
    memories: Sequence[MakeMemory] = (),
    window: int | None = None,
    sinks: int = 4,
    layers: Sequence[int] | None = None,
    gated: bool = True,
) -> MemoryTransformer:
    """Return a folder's model with memory (see :meth:`MemoryTransformer.with_memory`).

    Args:
        vocab_size: of the tokenizer that texts are read by, which is to be the folder's own; flows from the data.
        folder: a published decoder's, one of ours, or a training checkpoint.
        memories: added to the chosen layers.
        window: exact positions seen.
        sinks: first tokens of a document that are seen for good.
        layers: which get the memories; None for all.
        gated: whether they enter by gates that begin at 0.

    Raises:
        MemtxError: the tokenizer is not the folder's, or the folder's model cannot be read or take the memories.
    """
    model = MemoryTransformer.from_pretrained(folder)
    if vocab_size > model.vocab_size:
        raise MemtxError(
            f"The tokenizer has {vocab_size} ids, the model in '{folder}' {model.vocab_size}.",
            "Read texts by the folder's own tokenizer.json: data.tokenizer with its path.",
        )
    return model.with_memory(memories, window=window, sinks=sinks, layers=layers, gated=gated).train()
