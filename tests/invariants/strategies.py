"""Strategies of the invariant tests: models, streams with documents, and ways to split them into segments."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import FeedForward, MemoryTransformer, RelativePositions
from memtx.layers.positions.base import Alibi
from memtx.layers.positions.rotary import Rotary
from memtx.state import MemoryState
from tests.memory_zoo import KINDS, UNCOUNTED, output_memory

VOCAB_SIZE = 11


@dataclass(frozen=True)
class Case:
    """A small model in float64 and a batch of streams for it."""

    model: MemoryTransformer
    tokens: Tensor
    document_starts: Tensor
    description: str

    def __repr__(self) -> str:
        return self.description

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def slice(self, index: int, start: int = 0, stop: int | None = None) -> Case:
        """Return tokens [start, stop) of one stream."""
        streams = slice(index, index + 1)
        return Case(self.model, self.tokens[streams, start:stop], self.document_starts[streams, start:stop], "")


@st.composite
def cases(draw: st.DrawFn, kind: str, batch_size: int | None = None) -> Case:
    """Draw streams and a model with memories of the kind, with weights large enough for every term to matter."""
    window, compression_rate, num_entries = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    batch_size = batch_size or draw(st.integers(1, 3))
    length = draw(st.integers(1, 48))
    seed = draw(st.integers(0, 2**16))
    start_prob = draw(st.sampled_from([0.0, 0.05, 0.3]))
    kv_heads = draw(st.sampled_from([1, 2]))
    positions = draw(st.sampled_from([Rotary, Alibi] if kind in UNCOUNTED else [Rotary, Alibi, RelativePositions]))
    torch.manual_seed(seed)
    model = MemoryTransformer(
        VOCAB_SIZE, dim=8, depth=2, heads=2, kv_heads=kv_heads,
        memories=[KINDS[kind](window, compression_rate, num_entries)], feed_forward=FeedForward, positions=positions,
        output_memory=output_memory(kind, window, compression_rate),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    model.eval()
    tokens = torch.randint(0, VOCAB_SIZE, (batch_size, length))
    document_starts = torch.rand(batch_size, length) < start_prob
    description = (
        f"{kind} window={window} compression_rate={compression_rate} num_entries={num_entries} "
        f"batch_size={batch_size} length={length} seed={seed} start_prob={start_prob} {positions}"
    )
    return Case(model, tokens, document_starts, description)


@st.composite
def segment_bounds(draw: st.DrawFn, length: int) -> list[int]:
    """Draw the bounds of the segments of a stream of ``length`` tokens."""
    if draw(st.booleans()):
        return list(range(length + 1))
    return sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=6))})


def read(case: Case, bounds: list[int] | None = None, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """Read the streams in segments (one by default); return all logits and the final state."""
    logits = []
    for start, stop in itertools.pairwise(bounds or [0, case.length]):
        out = case.model(case.tokens[:, start:stop], state, document_starts=case.document_starts[:, start:stop])
        state = out.state
        logits.append(out.logits)
    assert state is not None
    return torch.cat(logits, dim=1), state


def distance(state: MemoryState, other: MemoryState) -> float:
    """Return the largest difference between two states, infinite if their structures or shapes differ."""
    leaves, others = pytree.tree_leaves(state), pytree.tree_leaves(other)
    if len(leaves) != len(others) or any(x.shape != y.shape for x, y in zip(leaves, others, strict=True)):
        return float("inf")
    differences = [
        (x.double() - y.double()).abs().max().item() for x, y in zip(leaves, others, strict=True) if x.numel()
    ]
    return max(differences, default=0.0)
