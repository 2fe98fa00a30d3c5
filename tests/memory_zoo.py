"""Every memory kind with small options, for the invariant tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.block_recurrent import BlockRecurrentMemory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import (
    AttentionPooling,
    DilatedConvolution,
    MaxPooling,
    MeanPooling,
    MostUsed,
    StridedConvolution,
)
from memtx.memory.copy_memory import CopyMemory
from memtx.memory.ernie_doc import ErnieDocMemory
from memtx.memory.expire_span import ExpireSpanMemory
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.infini import InfiniMemory
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.parts import DPFPFeatureMap, EluFeatureMap, Gate, ReflectingGate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.rmt import ARMTMemory, RMTMemory
from memtx.memory.sinks import SinkMemory
from memtx.memory.slots import SlotMemory
from memtx.memory.titans import PersistentMemory, TitansContextMemory, TitansMemory
from memtx.memory.top_k import TopKMemory
from tests.readme_memory import AverageMemory
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
    """Return a function from (window, rate, length) to the factory of a compressed memory."""
    kind = partial(CompressedMemory, compression=COMPRESSIONS[compression])
    return lambda window, rate, length: partial(kind, window=window, compression_rate=rate, num_entries=length)


def top_k(**options: Any) -> Callable[[int, int, int], Make]:
    """Return a function to the factory of a top-k bank whose scores differ."""

    def make(window: int, rate: int, length: int) -> Make:
        sizes = {"window": window, "compression_rate": rate, "num_entries": length}
        return partial(ScoredMemory, **(sizes | {"compression": MeanPooling} | options))

    return make


class ScoredMemory(TopKMemory):
    """A top-k memory with random score weights, as after training."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        torch.nn.init.normal_(self.score.weight)


class CalmARMTMemory(ARMTMemory):
    """An associative memory whose writes are weak: with random weights, the published correction can grow forever."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        torch.nn.init.constant_(self.write_gate.bias, -4.0)


def dual(window: int, rate: int, length: int) -> Stack:
    """Return a top-k bank of exact states and a delta-rule memory."""
    return [top_k(compression_rate=1)(window, rate, length), partial(AssociativeMemory, heads=2)]


def with_window(make: Callable[[int, int, int], Make]) -> Callable[[int, int, int], Stack]:
    """Return a function to the factories of a recurrent window and the memory next to it."""
    return lambda window, rate, length: [partial(RecurrentMemory, window=window), make(window, rate, length)]


def associative(**options: Any) -> Callable[[int, int, int], Stack]:
    """Return a function to the factories of a window and an associative memory."""
    return with_window(lambda window, rate, length: partial(AssociativeMemory, heads=2, **options))


def slots(**options: Any) -> Callable[[int, int, int], Stack]:
    """Return a function to the factories of a window and slots, written every 1 to 5 tokens."""
    return with_window(lambda window, rate, length: partial(SlotMemory, num_slots=3, interval=rate, heads=2, **options))


def retrieval(window: int, rate: int, length: int) -> Make:
    """Return the factory of a store that starts where the window ends."""
    return partial(RetrievalMemory, capacity=4 * rate, top_k=length + 1, exclude_recent=window, heads=2)


KINDS: dict[str, Callable[[int, int, int], Stack]] = {
    "recurrent": lambda window, rate, length: partial(RecurrentMemory, window=window),
    "recurrent-dilated": lambda window, rate, length: partial(RecurrentMemory, window=window, dilation=rate),
    "recurrent-dilated-head": lambda window, rate, length: partial(RecurrentMemory, window=window, dilation=[rate + 1]),
    "recurrent-expire-span": lambda window, rate, length: partial(
        ExpireSpanMemory, max_span=window + length, ramp=rate, initial_fraction=0.5
    ),
    **{f"compressed-{name}": compressed(name) for name in COMPRESSIONS},
    "compressed-entry-bias": lambda window, rate, length: partial(
        CompressedMemory, window=window, compression_rate=rate, num_entries=length, entry_bias=-1.0
    ),
    "recurrent-entry-bias": lambda window, rate, length: partial(
        RecurrentMemory, window=window + rate, near_window=window, entry_bias=-1.0
    ),
    "top-k-entry-bias": top_k(entry_bias=-1.0),
    "top-k": top_k(),
    "top-k-exact": top_k(compression_rate=1),
    "dual": dual,
    "associative": associative(),
    "associative-without-decay": associative(decay_gate=None, write_penalty=0.1),
    "associative-gated": associative(decay_gate=partial(Gate, bias_init=-2.0), key_dim=3, write_penalty=0.1),
    "associative-reflecting": associative(write_gate=ReflectingGate, decay_gate=None),
    "associative-infini": associative(delta_rule=False, feature_map=EluFeatureMap, mix_gate=True, decay_gate=None),
    "associative-armt": associative(feature_map=partial(DPFPFeatureMap, order=2), decay_gate=None),
    "gated-delta-net": lambda window, rate, length: partial(GatedDeltaNet, heads=2, key_heads=1, key_dim=3),
    "gated-delta-net-channel": lambda window, rate, length: partial(
        GatedDeltaNet, heads=2, conv_size=min(rate + 1, 4), negative_eigenvalues=True, decay="channel"
    ),
    "slots": slots(),
    "slots-memformer": slots(write_gate=None, token_shift=False, temperature=0.25),
    "retrieval": with_window(retrieval),
    "retrieval-layer": with_window(lambda *sizes: partial(retrieval(*sizes), layer_projections=True)),
    "sinks": with_window(
        lambda window, rate, length: partial(SinkMemory, num_sinks=min(length + 1, window + 1), exclude_recent=window)
    ),
    "sinks-with-positions": with_window(
        lambda window, rate, length: partial(
            SinkMemory, num_sinks=min(length + 1, window + 1), exclude_recent=window, use_positions=True
        )
    ),
    "tokens": with_window(lambda window, rate, length: partial(TokenMemory, num_tokens=2, interval=max(length, 1))),
    "rmt": lambda window, rate, length: partial(RMTMemory, num_tokens=rate, interval=length + 4),
    "armt": lambda window, rate, length: partial(
        CalmARMTMemory, num_tokens=rate, interval=length + 4, key_dim=3, eps=10.0
    ),
    "ernie-doc": lambda window, rate, length: partial(ErnieDocMemory, window=window, interval=max(length, 1)),
    "titans": lambda window, rate, length: [
        partial(RecurrentMemory, window=window),
        PersistentMemory,
        partial(TitansMemory, heads=2, interval=rate + 3),
    ],
    "titans-context": with_window(
        lambda window, rate, length: partial(TitansContextMemory, heads=2, interval=length + 4)
    ),
    "block-recurrent": with_window(
        lambda window, rate, length: partial(BlockRecurrentMemory, num_vectors=3, interval=rate, heads=2)
    ),
    "infini-delta": with_window(
        lambda window, rate, length: partial(InfiniMemory, heads=2, interval=rate, delta_rule=True)
    ),
    "third-party": with_window(lambda window, rate, length: RunningMean),
    "readme": with_window(lambda window, rate, length: AverageMemory),
    "copy": lambda window, rate, length: partial(RecurrentMemory, window=window),
}
"""Kinds whose results do not depend on segmentation."""


def output_memory(kind: str, window: int, rate: int) -> Callable[[int], CopyMemory] | None:
    """Return the factory of a kind's output memory, whose reach differs from the window's."""
    return partial(CopyMemory, num_entries=window + rate, key_dim=3) if kind == "copy" else None


CHOOSING = {
    "compressed-most_used",
    "retrieval",
    "retrieval-layer",
    "top-k",
    "top-k-exact",
    "top-k-entry-bias",
    "dual",
    "copy",
}
"""Kinds that choose between states or store fewer bits, where rounding in float32 may change the whole result."""

UNCOUNTED = {"recurrent-dilated", "recurrent-dilated-head", "sinks-with-positions", "dual", "rmt"}
UNCOUNTED |= {kind for kind in KINDS if kind.startswith("top-k")}
"""Kinds that relative positions do not support."""

READ_ON_HOST = {"tokens", "ernie-doc", "rmt", "armt", "titans", "titans-context", "block-recurrent", "infini-delta"}
"""Kinds of intervals that read on the host where these end or how many documents start in a call, once per call."""
