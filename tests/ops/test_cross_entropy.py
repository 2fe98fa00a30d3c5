"""The chunked loss is the plain one, values and gradients, without whole logits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.ops import cross_entropy
from memtx.ops.cross_entropy import IGNORED, chunked_cross_entropy


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_equals_plain(tokens: int, vocab: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORED
    loss = chunked_cross_entropy(hidden, weight, labels, chunk=chunk)
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    assert not loss[labels == IGNORED].any()
    factor = torch.linspace(1, 2, tokens, dtype=torch.float64)
    own = torch.autograd.grad((loss * factor).sum(), (hidden, weight))
    for one, two in zip(own, torch.autograd.grad((plain * factor).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_never_holds_whole_logits(monkeypatch: object) -> None:
    sizes = []
    plain = cross_entropy.F.cross_entropy

    class Counting:
        linear = staticmethod(F.linear)

        @staticmethod
        def cross_entropy(logits: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            sizes.append(logits.numel())
            return plain(logits, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cross_entropy, "F", Counting)  # type: ignore[attr-defined]
    hidden, weight = torch.randn(100, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(100, dtype=torch.int64), chunk=70).sum().backward()
    # 15 chunks, each computed once forward and once more for its gradient.
    assert max(sizes) <= 70
    assert len(sizes) == 30


def test_under_autocast_the_loss_is_float32() -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(10, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, torch.zeros(9, dtype=torch.int64), chunk=40)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
