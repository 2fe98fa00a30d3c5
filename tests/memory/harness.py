"""A small attention layer, and a stack of them, in float64: enough to run any memory, without fused kernels."""

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
    """Residual attention over one memory; a distance penalty reveals wrong positions."""

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
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) - 0.1 * distance[:, None]
        weights = scores.masked_fill(~create_mask(view.entry_positions.visibility)[:, None], float("-inf")).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        state, losses = self.memory.write(view, segment, LayerActivations(x, out, self))
        return x + out, state, losses


class Stack(nn.Module):
    """Layers that read a stream in segments."""

    def __init__(self, memory: Callable[[int], Memory[Any]], depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(memory(DIM)) for _ in range(depth))
        with torch.no_grad():
            # Compressions start as mean pooling, which would hide a wrong order of states.
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.double()

    def init_state(self, batch_size: int) -> MemoryState:
        like = torch.zeros(1, dtype=torch.float64)
        states = tuple((layer.memory.init_state(batch_size, like=like),) for layer in self.layers)
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64), states)

    def step(
        self, x: Tensor, state: MemoryState, document_starts: Tensor | None
    ) -> tuple[Tensor, MemoryState, list[Losses]]:
        segment, next_states, losses = Segment.from_document_starts(state.position, x.shape[1], document_starts), [], []
        for layer, (layer_state,) in zip(self.layers, state.layers, strict=True):
            x, layer_state, layer_losses = layer(x, layer_state, segment)
            next_states.append((layer_state,))
            losses.append(layer_losses)
        return x, MemoryState(segment.next_position, tuple(next_states)), losses

    def run(self, x: Tensor, document_starts: Tensor, ends: Sequence[int], state: MemoryState | None = None) -> Any:
        """Read x in segments that end at ``ends``; return the outputs and the state."""
        state, outputs, start = state or self.init_state(x.shape[0]), [], 0
        for stop in sorted({*ends, x.shape[1]} - {0}):
            out, state, _ = self.step(x[:, start:stop], state, document_starts[:, start:stop])
            outputs.append(out)
            start = stop
        return torch.cat(outputs, 1), state


@st.composite
def streams(draw: st.DrawFn, max_length: int = 60) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs ``(batch, n, DIM)``, document starts ``(batch, n)`` and ends of segments."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch_size, n = draw(st.integers(1, 3)), draw(st.integers(1, max_length))
    x = torch.randn(batch_size, n, DIM, dtype=torch.float64, generator=generator)
    document_starts = torch.rand(batch_size, n, generator=generator) < draw(st.sampled_from((0.0, 0.03, 0.1, 0.4)))
    return x, document_starts, draw(st.lists(st.integers(0, n), max_size=7))
