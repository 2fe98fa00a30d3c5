"""What memories answer joins attention: as one softmax, by a share, or added."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.layers.combine import combine_readouts
from memtx.memory.base import Readout
from memtx.ops.attention.reference import softmax_attention

# float64 sums of a dozen terms of order one, in another order.
EXACT = 1e-12


def parts(seed: int, sizes: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return scores, visibility and values of several sets of keys."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, 3, 5, n, dtype=torch.float64, generator=draw) for n in sizes]
    seen = [torch.rand(2, 3, 5, n, generator=draw) < 0.6 for n in sizes]
    values = [torch.randn(2, 3, n, 4, dtype=torch.float64, generator=draw) for n in sizes]
    return scores, seen, values


@given(st.integers(0, 999), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_log_sum_exps_are_joined_into_one_softmax(seed: int, sizes: list[int]) -> None:
    """Queries that see nothing anywhere included: they get zero."""
    scores, seen, values = parts(seed, sizes)
    (own, lse), *others = [softmax_attention(*one) for one in zip(scores, seen, values, strict=True)]
    found = combine_readouts(own, lse, [Readout(out, lse=one) for out, one in others])
    whole, _ = softmax_attention(torch.cat(scores, -1), torch.cat(seen, -1), torch.cat(values, -2))
    assert (found - whole).abs().max() < EXACT


@given(st.integers(0, 999))
def test_shares_and_sums_in_order(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    own, one, two = (torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=draw) for _ in range(3))
    gate = torch.rand(1, 3, 1, 1, dtype=torch.float64, generator=draw)
    mixed = gate * one + (1 - gate) * own
    assert (combine_readouts(own, None, [Readout(one, gate=gate), Readout(two)]) - (mixed + two)).abs().max() < EXACT
    assert combine_readouts(own, None, []) is own
