"""The memories that the scripts compare, by name: a list of memories for each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from memtx.memory.associative import AssociativeMemory
from memtx.memory.base import Memory
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import MeanPooling
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.memory_tokens import TokenMemory
from memtx.memory.none import NoMemory
from memtx.memory.parts import Gate, ReflectingGate
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.retrieval import RetrievalMemory
from memtx.memory.slots import SlotMemory
from memtx.memory.top_k import TopKMemory

MemoryFactory = Callable[[int], Memory[Any]]
MemoryStacks = dict[str, list[MemoryFactory]]


def comparison_stacks(window: int) -> MemoryStacks:
    """Return every kind of memory with a window of one segment, and ablations of the associative memory."""
    exact: MemoryFactory = partial(RecurrentMemory, window=window)
    quarter, reach = max(window // 4, 1), 3 * window // 2
    associative: Any = partial(AssociativeMemory, heads=2, decay_gate=None)
    penalized = partial(associative, write_penalty=0.1)
    return {
        "window": [exact],
        "recurrent, 2.5 windows": [partial(RecurrentMemory, window=5 * window // 2)],
        "compressed 4:1": [
            partial(CompressedMemory, window=window, compression_rate=4, num_entries=reach, compression=MeanPooling)
        ],
        "top-k, exact": [partial(TopKMemory, window=window, compression_rate=1, num_entries=reach)],
        "associative": [exact, penalized],
        "associative, reflecting": [exact, partial(associative, write_gate=ReflectingGate)],
        "associative, no penalty": [exact, associative],
        "associative, decay": [exact, partial(AssociativeMemory, heads=2)],
        "top-k and associative": [
            partial(TopKMemory, window=window, compression_rate=1, num_entries=2 * quarter), penalized
        ],
        "slots": [exact, partial(SlotMemory, num_slots=8, interval=window, heads=4)],
        "memory tokens": [exact, partial(TokenMemory, num_tokens=8, interval=window)],
        "retrieval": [exact, partial(RetrievalMemory, capacity=16 * window, top_k=8, exclude_recent=window, heads=2)],
        "associative, plain sigmoid": [exact, partial(associative, write_gate=partial(Gate, stretch=0.0))],
        "associative, no delta rule": [exact, partial(associative, delta_rule=False)],
    }  # fmt: skip


def hybrid_stacks(window: int) -> MemoryStacks:
    """Return hybrids, a memory per layer: a Gated DeltaNet in place of attention, then attention within the window.

    Writes of strengths up to 2 can flip the sign of what is stored.
    """
    exact: MemoryFactory = partial(RecurrentMemory, window=window)
    delta: Any = partial(GatedDeltaNet, heads=2)
    return {
        "gated delta net": [delta, exact],
        "gated delta net, beta to 2": [partial(delta, negative_eigenvalues=True), exact],
    }


def replay_stacks(window: int) -> MemoryStacks:
    """Return the memories whose training steps are measured with and without replay."""
    exact: MemoryFactory = partial(RecurrentMemory, window=window)
    slots: Any = partial(SlotMemory, num_slots=16, interval=window)
    return {
        # As published: only the slots are carried.
        "memformer": [NoMemory, partial(slots, write_gate=None, token_shift=False, temperature=0.25)],
        "recurrent": [exact],
        "compressed": [partial(CompressedMemory, window=window, compression_rate=4, num_entries=window // 4)],
        "associative": [exact, AssociativeMemory],
        "slots": [exact, slots],
    }


def retrofit_stacks(window: int) -> MemoryStacks:
    """Return the memories that can be added to a trained model."""
    return {
        "associative": [partial(AssociativeMemory, heads=4, decay_gate=None)],
        "compressed": [partial(CompressedMemory, window=window, compression_rate=4, num_entries=window // 2)],
        "compressed-entry-bias": [
            partial(CompressedMemory, window=window, compression_rate=4, num_entries=window // 2, entry_bias=-3.0)
        ],
        "slots": [partial(SlotMemory, num_slots=16, interval=window // 4)],
    }
