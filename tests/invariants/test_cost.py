"""Invariant 4: neither the state nor the cost of a token grows with the number of tokens read."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memtx import MemoryTransformer
from memtx.memory.recurrent import RecurrentMemory
from memtx.state import MemoryState
from tests.memory_zoo import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_cost_and_state_size_do_not_grow_with_the_position(kind: str) -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[KINDS[kind](6, 3, 4)]).eval()
    tokens = torch.randint(0, 11, (2, 7))
    costs, sizes = [], []
    state = model.init_state(2)
    for position in (0, 10_000, 10_000_000, 2**40):
        # Only the position differs: once the windows are full, the cost must not depend on it.
        distant_state = MemoryState(torch.full((2,), position), state.layers)
        with FlopCounterMode(display=False) as counter:
            out = model(tokens, distant_state)
        costs.append(counter.get_total_flops())
        sizes.append(out.state.nbytes)
        assert torch.isfinite(out.logits).all()
    assert len(set(costs[1:])) == 1
    assert 0 < costs[0] <= costs[1]
    assert len(set(sizes)) == 1
    assert sizes[0] == state.nbytes


def test_a_short_text_does_not_pay_for_a_long_window() -> None:
    costs = []
    for window in (20, 2000):
        memory = partial(RecurrentMemory, window=window)
        model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[memory]).eval()
        state = None
        with FlopCounterMode(display=False) as counter:
            for _ in range(2):
                state = model(torch.randint(0, 11, (2, 10)), state).state
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_distant_positions_are_as_exact_as_near_ones(kind: str) -> None:
    """The same tokens read at position n and at 2^40 + n give the same logits: angles do not lose precision."""
    torch.manual_seed(0)
    compression_rate = 3
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[KINDS[kind](6, compression_rate, 4)]).eval()
    tokens = torch.randint(0, 11, (1, 200))
    near = model(tokens[:, :90]).state
    # Far away, but at the same position within a compression block.
    distant = MemoryState(near.position + compression_rate * 2**38, near.layers)
    assert torch.equal(model(tokens[:, 90:], near).logits, model(tokens[:, 90:], distant).logits)
