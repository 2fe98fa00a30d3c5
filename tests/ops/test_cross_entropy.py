"""The chunked loss equals the plain loss in values and gradients, without full logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memtx.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_chunked_loss_equals_plain_cross_entropy(tokens: int, vocab: int, max_chunk_logits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    total, nll = linear_cross_entropy(hidden, weight, labels, max_chunk_logits=max_chunk_logits)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(total, expected.sum(), rtol=0, atol=1e-11)
    assert not nll.requires_grad
    grads = torch.autograd.grad(total * 0.7, (hidden, weight))
    expected_grads = torch.autograd.grad(expected.sum() * 0.7, (hidden, weight))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, max_chunk_logits=max_chunk_logits)[1], nll)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_either_input_can_be_frozen(frozen: str) -> None:
    hidden, weight = torch.randn(9, 4).requires_grad_(), torch.randn(10, 4).requires_grad_()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, torch.arange(9))[0].backward()
    trainable = weight if frozen == "hidden" else hidden
    assert trainable.grad is not None
    assert trainable.grad.abs().max() > 0


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any created tensor."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_full_logits_are_never_held() -> None:
    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, torch.zeros(1000, dtype=torch.int64), max_chunk_logits=5000)[0].backward()
    # The gradient of the hidden states has 4,000 elements; full logits would have 100,000.
    assert largest.numel <= 5000


def test_autocast_loss_is_float32_and_close_to_exact() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 32, requires_grad=True), torch.randn(10, 32, requires_grad=True)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.arange(9))[0], (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = linear_cross_entropy(hidden, weight, torch.arange(9), max_chunk_logits=40)
    assert total.dtype == nll.dtype == torch.float32
    for grad, expected_grad in zip(torch.autograd.grad(total, (hidden, weight)), expected, strict=True):
        assert grad.dtype == torch.float32
        # bf16 has 8 bits, for logits of size about 20.
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0.2)
