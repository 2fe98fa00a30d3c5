"""Same-layer recurrence against a plain cache whose states are replaced by hand, and its reach."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import ErnieDocMemory, MemoryState, MemoryTransformer, RecurrentMemory
from memtx.memory.recurrent import RecurrentState

ROUNDING = 1e-10
"""Sums of float64 in another order."""


def build_model(memory: Any, depth: int) -> MemoryTransformer:
    torch.manual_seed(0)
    model = MemoryTransformer(11, dim=8, depth=depth, heads=2, memories=[memory]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@given(
    window=st.integers(1, 9),
    interval=st.integers(1, 6),
    depth=st.integers(1, 3),
    n=st.integers(1, 30),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_past_intervals_are_represented_by_their_outputs(
    window: int, interval: int, depth: int, n: int, seed: int
) -> None:
    """The reference reads one interval per call and then puts the layer's outputs into a plain cache."""
    model, plain = (
        build_model(memory, depth)
        for memory in (
            partial(ErnieDocMemory, window=window, interval=interval),
            partial(RecurrentMemory, window=window),
        )
    )
    tokens = torch.randint(11, (1, n), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        out = model(tokens)
        state, logits = plain.init_state(1), []
        for part in tokens.split(interval, dim=1):
            output = plain(part, state, return_hidden_states=True)
            logits.append(output.logits)
            layers = []
            for number, (block, past) in enumerate(zip(plain.blocks, state.layers, strict=True)):
                layer_output = block.attention_norm(output.hidden_states[number + 1])
                extended = torch.cat([past[0].hidden, layer_output], dim=1)
                layers.append((RecurrentState(extended[:, extended.shape[1] - (window - 1) :]),))
            state = MemoryState(output.state.position, tuple(layers))
        assert (out.logits - torch.cat(logits, dim=1)).abs().max() < ROUNDING


def test_reaches_beyond_one_window_per_layer() -> None:
    tokens = torch.randint(11, (1, 60), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 11
    for memory, expected in (
        (partial(ErnieDocMemory, window=4, interval=3), True),
        (partial(RecurrentMemory, window=4), False),
    ):
        model = build_model(memory, depth=2)
        with torch.no_grad():
            differs = bool((model(tokens).logits[:, -1] != model(other).logits[:, -1]).any())
        assert differs == expected
