"""Readouts are combined with attention in one softmax, by a gate, or by addition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.layers.combine import combine_readouts
from memtx.memory.base import Readout
from memtx.ops.attention.reference import softmax_attention

# Sums of a dozen float64 terms of order 1 in another order.
EXACT = 1e-12


def parts(seed: int, sizes: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the scores, masks and values of several sets of keys."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, 3, 5, n, dtype=torch.float64, generator=generator) for n in sizes]
    masks = [torch.rand(2, 3, 5, n, generator=generator) < 0.6 for n in sizes]
    values = [torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator) for n in sizes]
    return scores, masks, values


@given(st.integers(0, 999), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_readouts_with_log_sum_exp_join_one_softmax(seed: int, sizes: list[int]) -> None:
    """Queries that see nothing at all get zero."""
    scores, masks, values = parts(seed, sizes)
    (attended, lse), *others = [softmax_attention(*part) for part in zip(scores, masks, values, strict=True)]
    actual = combine_readouts(attended, lse, [Readout(out, lse=other_lse) for out, other_lse in others])
    expected, _ = softmax_attention(torch.cat(scores, -1), torch.cat(masks, -1), torch.cat(values, -2))
    assert (actual - expected).abs().max() < EXACT


@given(st.integers(0, 999))
def test_gated_and_added_readouts_follow_in_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    attended, gated_out, added = (torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    gate = torch.rand(1, 3, 1, 1, dtype=torch.float64, generator=generator)
    mixed = gate * gated_out + (1 - gate) * attended
    assert (
        combine_readouts(attended, None, [Readout(gated_out, gate=gate), Readout(added)]) - (mixed + added)
    ).abs().max() < EXACT
    assert combine_readouts(attended, None, []) is attended
