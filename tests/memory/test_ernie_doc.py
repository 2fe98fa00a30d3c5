"""Same-layer recurrence against a plain cache whose states are exchanged by hand, and how far it reaches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import ErnieDocMemory, MemoryState, MemoryTransformer, RecurrentMemory
from memtx.memory.recurrent import RecurrentState

ROUNDING = 1e-10
"""float64, sums in another order."""


def made(memory: Any, depth: int) -> MemoryTransformer:
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
def test_past_intervals_stand_by_their_outputs(window: int, interval: int, depth: int, n: int, seed: int) -> None:
    """By hand: an interval a call through a plain cache, then the layer's outputs put where its inputs stood."""
    model, plain = (
        made(memory, depth)
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
            found = plain(part, state, return_hidden_states=True)
            logits.append(found.logits)
            layers = []
            for number, (block, before) in enumerate(zip(plain.blocks, state.layers, strict=True)):
                told = block.attention_norm(found.hidden_states[number + 1])
                whole = torch.cat([before[0].hidden, told], dim=1)
                layers.append((RecurrentState(whole[:, whole.shape[1] - (window - 1) :]),))
            state = MemoryState(found.state.position, tuple(layers))
        assert (out.logits - torch.cat(logits, dim=1)).abs().max() < ROUNDING


def test_it_reaches_farther_than_as_many_windows_as_layers() -> None:
    tokens = torch.randint(11, (1, 60), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 11
    for memory, reaches in (
        (partial(ErnieDocMemory, window=4, interval=3), True),
        (partial(RecurrentMemory, window=4), False),
    ):
        model = made(memory, depth=2)
        with torch.no_grad():
            differs = bool((model(tokens).logits[:, -1] != model(other).logits[:, -1]).any())
        assert differs == reaches
