"""A tiny attention layer and a stream of them in float64: enough to run any memory, nothing fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from memtx.memory.base import LayerActivations, Losses, Memory, View
from memtx.ops.attention.mask import create_mask
from memtx.segment import Segment
from memtx.state import MemoryState

DIM, HEADS = 4, 2


class Layer(nn.Module):
    """Residual attention over one memory; a distance penalty shows wrong places."""

    def __init__(self, memory: Memory[Any]) -> None:
        super().__init__()
        self.memory = memory
        self.parts = nn.ModuleDict({part: nn.Linear(DIM, DIM) for part in ("query", "key", "value")})
        self.views: list[View] = []

    def project(self, x: Tensor, projection: str, *, frozen: bool) -> Tensor:
        linear = self.parts[projection]
        weight, bias = (p.detach() if frozen else p for p in (linear.weight, linear.bias))
        return nn.functional.linear(x, weight, bias).unflatten(-1, (HEADS, -1))

    def forward(self, x: Tensor, state: Any, segment: Segment) -> tuple[Tensor, Any, Losses]:
        view = self.memory.read(state, x, segment, self)
        self.views.append(view)
        q = self.project(x, "query", frozen=False)
        k, v = (self.project(torch.cat(view.parts, dim=1), part, frozen=False) for part in ("key", "value"))
        distance = torch.arange(x.shape[1])[None, :, None] - view.entry_positions.offset[:, None]
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) - 0.1 * distance[:, None]
        weights = scores.masked_fill(~create_mask(view.entry_positions.visibility)[:, None], float("-inf")).softmax(-1)
        out = torch.einsum("rhqk,rkhd->rqhd", weights, v).flatten(2)
        state, losses = self.memory.write(view, segment, LayerActivations(x, out, self))
        return x + out, state, losses


class Stack(nn.Module):
    """Layers and a state, cut as told."""

    def __init__(self, memory: Callable[[int], Memory[Any]], depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(memory(DIM)) for _ in range(depth))
        with torch.no_grad():
            # Compressions begin as mean pooling, which would hide a wrong order of states.
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.double()

    def init_state(self, rows: int) -> MemoryState:
        like = torch.zeros(1, dtype=torch.float64)
        states = tuple((layer.memory.init_state(rows, like=like),) for layer in self.layers)
        return MemoryState(torch.zeros(rows, dtype=torch.int64), states)

    def step(self, x: Tensor, state: MemoryState, starts: Tensor | None) -> tuple[Tensor, MemoryState, list[Losses]]:
        segment, after, losses = Segment.from_document_starts(state.position, x.shape[1], starts), [], []
        for layer, (own,) in zip(self.layers, state.layers, strict=True):
            x, own, lost = layer(x, own, segment)
            after.append((own,))
            losses.append(lost)
        return x, MemoryState(segment.next_position, tuple(after)), losses

    def run(self, x: Tensor, starts: Tensor, cuts: Sequence[int], state: MemoryState | None = None) -> Any:
        """Read x in pieces ending at ``cuts``; return outputs and state."""
        state, outputs, begin = state or self.init_state(x.shape[0]), [], 0
        for stop in sorted({*cuts, x.shape[1]} - {0}):
            out, state, _ = self.step(x[:, begin:stop], state, starts[:, begin:stop])
            outputs.append(out)
            begin = stop
        return torch.cat(outputs, 1), state


@st.composite
def streams(draw: st.DrawFn, most: int = 60) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs (rows, n, DIM), document starts (rows, n) and where to cut."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, most))
    x = torch.randn(rows, n, DIM, dtype=torch.float64, generator=generator)
    starts = torch.rand(rows, n, generator=generator) < draw(st.sampled_from((0.0, 0.03, 0.1, 0.4)))
    return x, starts, draw(st.lists(st.integers(0, n), max_size=7))
