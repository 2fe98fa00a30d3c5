"""Every memory kind with small options: the promise tests run on each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import (
    AttentionPooling,
    DilatedConvolution,
    MaxPooling,
    MeanPooling,
    MostUsed,
    StridedConvolution,
)
from memtx.memory.ernie_doc import ErnieDocMemory
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.parts import DPFPFeatureMap, EluFeatureMap, Gate, ReflectingGate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.sinks import SinkMemory
from memtx.memory.slots import SlotMemory
from memtx.memory.top_k import TopKMemory
from tests.third_party_memory import RunningMean

Make = Callable[[int], Memory[Any]]
Stack = Make | list[Make]

COMPRESSIONS: dict[str, Any] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "convolution": StridedConvolution,
    "dilated": DilatedConvolution,
    "most_used": MostUsed,
    "queries": partial(AttentionPooling, heads=2),
}


def compressed(compression: str) -> Callable[[int, int, int], Make]:
    """Return a maker of the kind from (window, rate, length)."""
    return lambda window, rate, length: partial(
        CompressedMemory,
        window=window,
        compression_rate=rate,
        num_entries=length,
        compression=COMPRESSIONS[compression],
    )


def scored(**options: Any) -> Callable[[int, int, int], Make]:
    """Return a maker of the bank that keeps the highest, whose scores are not all equal."""

    def make(window: int, rate: int, length: int) -> Make:
        return partial(
            Scored,
            **(
                {"window": window, "compression_rate": rate, "num_entries": length, "compression": MeanPooling}
                | options
            ),
        )

    return make


class Scored(TopKMemory):
    """One whose scores have left zero, as training makes them."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        torch.nn.init.normal_(self.score.weight)


def dual(window: int, rate: int, length: int) -> Stack:
    """Make a delta state beside a bank of exact states that keeps the highest."""
    return [scored(compression_rate=1)(window, rate, length), partial(AssociativeMemory, heads=2)]


def beside(make: Callable[[int, int, int], Make]) -> Callable[[int, int, int], Stack]:
    """Return a maker of a stack: a window, and the kind beside it."""
    return lambda window, rate, length: [partial(RecurrentMemory, window=window), make(window, rate, length)]


def associative(**options: Any) -> Callable[[int, int, int], Stack]:
    """Return a maker of the kind beside a window."""
    return beside(lambda window, rate, length: partial(AssociativeMemory, heads=2, **options))


def slots(**options: Any) -> Callable[[int, int, int], Stack]:
    """Return a maker of the kind beside a window; written every 1 to 5 tokens."""
    return beside(lambda window, rate, length: partial(SlotMemory, num_slots=3, interval=rate, heads=2, **options))


def retrieval(window: int, rate: int, length: int) -> Make:
    """Make the kind that takes over where a window ends."""
    return partial(RetrievalMemory, capacity=4 * rate, top_k=length + 1, exclude_recent=window, heads=2)


KINDS: dict[str, Callable[[int, int, int], Stack]] = {
    "recurrent": lambda window, rate, length: partial(RecurrentMemory, window=window),
    **{f"compressed-{name}": compressed(name) for name in COMPRESSIONS},
    "scored": scored(),
    "scored-exact": scored(compression_rate=1),
    "dual": dual,
    "associative": associative(),
    "associative-keeping": associative(decay_gate=None, write_penalty=0.1),
    "associative-gated": associative(decay_gate=partial(Gate, bias_init=-2.0), key_dim=3, write_penalty=0.1),
    "associative-reflecting": associative(write_gate=ReflectingGate, decay_gate=None),
    "associative-infini": associative(delta_rule=False, feature_map=EluFeatureMap, mix_gate=True, decay_gate=None),
    "associative-armt": associative(feature_map=partial(DPFPFeatureMap, order=2), decay_gate=None),
    "slots": slots(),
    "slots-memformer": slots(write_gate=None, token_shift=False, temperature=0.25),
    "retrieval": beside(retrieval),
    "sinks": beside(
        lambda window, rate, length: partial(SinkMemory, num_sinks=min(length + 1, window + 1), exclude_recent=window)
    ),
    "sinks-placed": beside(
        lambda window, rate, length: partial(
            SinkMemory, num_sinks=min(length + 1, window + 1), exclude_recent=window, use_positions=True
        )
    ),
    "tokens": beside(lambda window, rate, length: partial(TokenMemory, num_tokens=2, interval=max(length, 1))),
    "same-layer": lambda window, rate, length: partial(ErnieDocMemory, window=window, interval=max(length, 1)),
    "theirs": beside(lambda window, rate, length: RunningMean),
}
"""Kinds for which how a stream is cut does not matter."""

CHOOSING = {"compressed-most_used", "retrieval", "scored", "scored-exact", "dual"}
"""Kinds that choose between states: nearly equal ones may be told apart otherwise in float32, and that shows whole."""
