"""Attention over parts of the keys, joined, is attention over all of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention.combine import merge_attention


def attention(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(scores, -1)
    nothing = (lse == float("-inf"))[..., None]
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0) @ v, lse


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from((0.0, 0.5, 1.0)))
@settings(deadline=None, max_examples=40)
def test_union(parts: list[int], seed: int, blind: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = sum(parts)
    scores = 5 * torch.randn(2, 6, keys, dtype=torch.float64, generator=generator)
    scores = scores.masked_fill(torch.rand(2, 6, keys, generator=generator) < blind, float("-inf")).requires_grad_()
    v = torch.randn(2, keys, 3, dtype=torch.float64, generator=generator)
    pieces = zip(scores.split(parts, -1), v.split(parts, 1), strict=True)
    out, lse = merge_attention([attention(score, value) for score, value in pieces])
    truth, truth_lse = attention(scores, v)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-12)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    scores, v = torch.randn(64, 40), torch.randn(40, 8)
    parts = [attention(scores[:, i : i + 5], v[i : i + 5]) for i in range(0, 40, 5)]
    rounded = [(out.bfloat16(), lse) for out, lse in parts]
    exact = merge_attention([(out.float(), lse) for out, lse in rounded])[0]
    assert merge_attention(rounded)[0].dtype == torch.bfloat16
    assert torch.equal(merge_attention(rounded)[0], exact.bfloat16())


def test_gradients_stay_finite_where_nothing_is_seen() -> None:
    lse = torch.tensor([[float("-inf"), 0.3], [float("-inf"), float("-inf")]], requires_grad=True)
    out = torch.ones(2, 2, 3, requires_grad=True)
    merged, whole = merge_attention([(out[0], lse[0]), (out[1], lse[1])])
    (merged.sum() + whole[1]).backward()
    assert lse.grad is not None
    assert out.grad is not None
    torch.testing.assert_close(lse.grad, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(out.grad.sum(-1), torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
