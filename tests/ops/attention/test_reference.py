"""Attention over parts of the keys, merged, equals attention over all of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention.reference import merge_attention
from memtx.ops.attention.scores import compute_scores


def attention(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(scores, -1)
    fully_masked = (lse == float("-inf"))[..., None]
    weights = torch.softmax(scores.masked_fill(fully_masked, 0.0), -1).masked_fill(fully_masked, 0.0)
    return weights @ v, lse


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from((0.0, 0.5, 1.0)))
@settings(deadline=None, max_examples=40)
def test_merged_parts_equal_attention_over_their_union(sizes: list[int], seed: int, mask_prob: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = sum(sizes)
    scores = 5 * torch.randn(2, 6, keys, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 6, keys, generator=generator) < mask_prob
    scores = scores.masked_fill(mask, float("-inf")).requires_grad_()
    v = torch.randn(2, keys, 3, dtype=torch.float64, generator=generator)
    parts = zip(scores.split(sizes, -1), v.split(sizes, 1), strict=True)
    out, lse = merge_attention([attention(part_scores, part_v) for part_scores, part_v in parts])
    expected, expected_lse = attention(scores, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_half_precision_parts_are_rounded_once() -> None:
    torch.manual_seed(0)
    scores, v = torch.randn(64, 40), torch.randn(40, 8)
    parts = [attention(scores[:, i : i + 5], v[i : i + 5]) for i in range(0, 40, 5)]
    rounded = [(out.bfloat16(), lse) for out, lse in parts]
    exact = merge_attention([(out.float(), lse) for out, lse in rounded])[0]
    assert merge_attention(rounded)[0].dtype == torch.bfloat16
    assert torch.equal(merge_attention(rounded)[0], exact.bfloat16())


def test_gradients_of_fully_masked_queries_are_finite() -> None:
    lse = torch.tensor([[float("-inf"), 0.3], [float("-inf"), float("-inf")]], requires_grad=True)
    out = torch.ones(2, 2, 3, requires_grad=True)
    merged, merged_lse = merge_attention([(out[0], lse[0]), (out[1], lse[1])])
    (merged.sum() + merged_lse[1]).backward()
    assert lse.grad is not None
    assert out.grad is not None
    torch.testing.assert_close(lse.grad, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    # The output of a query that sees nothing is a constant, so its gradient only has to be finite.
    assert out.grad.isfinite().all()
    torch.testing.assert_close(out.grad[:, 1].sum(-1), torch.tensor([3.0, 0.0]))


def test_scores_are_float32_under_autocast() -> None:
    q, k = torch.randn(1, 2, 5, 32).bfloat16(), torch.randn(1, 2, 7, 32).bfloat16()
    expected = q.float() @ k.float().transpose(-1, -2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = compute_scores(q, k, 1.0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
