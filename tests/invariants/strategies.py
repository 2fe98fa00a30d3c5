"""What the promise tests draw: models, streams with documents, and ways to cut them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx import FeedForward, MemoryTransformer
from memtx.layers.positions.base import Alibi
from memtx.layers.positions.rotary import Rotary
from memtx.state import MemoryState
from tests.memory_zoo import KINDS

VOCABULARY = 11


@dataclass(frozen=True)
class Case:
    """A small model in float64 and a stream for it."""

    model: MemoryTransformer
    tokens: Tensor
    starts: Tensor
    described: str

    def __repr__(self) -> str:
        return self.described


@st.composite
def cases(draw: st.DrawFn, kind: str, rows: int | None = None) -> Case:
    """Draw a model with memories of the kind, weights wide enough for every term to show, and a stream."""
    window, rate, length = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    count = rows or draw(st.integers(1, 3))
    n = draw(st.integers(1, 48))
    seed = draw(st.integers(0, 2**16))
    density = draw(st.sampled_from([0.0, 0.05, 0.3]))
    kv_heads = draw(st.sampled_from([1, 2]))
    positions = draw(st.sampled_from([Rotary, Alibi]))
    torch.manual_seed(seed)
    model = MemoryTransformer(
        VOCABULARY, dim=8, depth=2, heads=2, kv_heads=kv_heads, memories=[KINDS[kind](window, rate, length)],
        feed_forward=FeedForward, positions=positions,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    model.eval()
    tokens = torch.randint(0, VOCABULARY, (count, n))
    starts = torch.rand(count, n) < density
    described = f"{kind} W={window} c={rate} L={length} rows={count} n={n} seed={seed} starts={density} {positions}"
    return Case(model, tokens, starts, described)


@st.composite
def cuts(draw: st.DrawFn, n: int) -> list[int]:
    """Draw the borders of segments of a stream of n tokens."""
    if draw(st.booleans()):
        return list(range(n + 1))
    return sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=6))})


def read(case: Case, borders: list[int], state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
    """Read the stream in the given segments; return all logits and the last state."""
    logits = []
    for low, high in itertools.pairwise(borders):
        out = case.model(case.tokens[:, low:high], state, document_starts=case.starts[:, low:high])
        state = out.state
        logits.append(out.logits)
    assert state is not None
    return torch.cat(logits, dim=1), state


def distance(one: MemoryState, other: MemoryState) -> float:
    """Return the greatest difference between two states, infinite if they differ in structure or shape."""
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    if len(leaves) != len(others) or any(a.shape != b.shape for a, b in zip(leaves, others, strict=True)):
        return float("inf")
    gaps = [(a.double() - b.double()).abs().max().item() for a, b in zip(leaves, others, strict=True) if a.numel()]
    return max(gaps, default=0.0)
