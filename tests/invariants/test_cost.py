"""Promise 4: what is carried and what a token costs do not grow with what was read."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memtx import MemoryTransformer
from memtx.state import MemoryState
from tests.memory_zoo import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_token_ten_million_costs_what_token_ten_thousand_costs(kind: str) -> None:
    torch.manual_seed(0)
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[KINDS[kind](6, 3, 4)]).eval()
    tokens = torch.randint(0, 11, (2, 7))
    costs, sizes = [], []
    state = model.init_state(2)
    for position in (0, 10_000, 10_000_000, 2**40):
        # Only the position differs: shapes, and so the work, may not depend on it.
        at = MemoryState(torch.full((2,), position), state.layers)
        with FlopCounterMode(display=False) as counter:
            out = model(tokens, at)
        costs.append(counter.get_total_flops())
        sizes.append(out.state.nbytes)
        assert torch.isfinite(out.logits).all()
    assert len(set(costs)) == 1
    assert costs[0] > 0
    assert len(set(sizes)) == 1
    assert sizes[0] == state.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_far_positions_are_as_exact_as_near_ones(kind: str) -> None:
    """The same content read at position 0 + n and at 2^40 + n gives the same logits: angles do not wear out."""
    torch.manual_seed(0)
    rate = 3
    model = MemoryTransformer(11, dim=8, depth=2, heads=2, memories=[KINDS[kind](6, rate, 4)]).eval()
    tokens = torch.randint(0, 11, (1, 200))
    near = model(tokens[:, :90])
    # Far on, but at the same place within a compression block.
    far = MemoryState(near.state.position + rate * 2**38, near.state.layers)
    one, other = model(tokens[:, 90:], near.state).logits, model(tokens[:, 90:], far).logits
    assert torch.equal(one, other)
