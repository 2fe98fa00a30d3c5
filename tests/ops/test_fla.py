"""The mapping to flash-linear-attention's rule, tested with a plain rule of its signature in place of its kernels."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memtx.ops import fla
from memtx.ops.delta_rule import naive_recurrent_gated_delta_rule

EXACT = 1e-12  # float64, sums in another order; exp(-60) of the matrix passes a document's start


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute fla-core's rule: ``(batch, length, heads, width)``, g and beta ``(batch, length, heads)``."""
    assert not use_qk_l2norm_in_kernel
    assert not head_first
    assert cu_seqlens is None
    assert q.shape[2] == v.shape[2]
    assert initial_state is not None
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        update = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * update[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * (scale or q.shape[-1] ** -0.5)))
    return torch.stack(outputs, dim=1), state if output_final_state else None


@pytest.fixture
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_stub")
@pytest.mark.parametrize("has_decay", [True, False])
def test_documents_grouped_heads_strengths_and_gradients_match(has_decay: bool) -> None:
    batch, key_heads, heads, length, key_dim, value_dim = 2, 2, 4, 9, 5, 3
    float64 = {"dtype": torch.float64}
    q, k = (
        torch.nn.functional.normalize(torch.randn(batch, key_heads, length, key_dim, **float64), dim=-1)
        for _ in range(2)
    )
    v, beta = torch.randn(batch, heads, length, value_dim, **float64), 2 * torch.rand(batch, heads, length, **float64)
    log_decay = -torch.rand(batch, heads, length, **float64) if has_decay else None
    state, document_starts = torch.randn(batch, heads, key_dim, value_dim, **float64), torch.rand(batch, length) < 0.3
    leaves = [x.requires_grad_() for x in (q, k, v, beta, state, *([] if log_decay is None else [log_decay]))]
    actual = fla.fla_gated_delta_rule(q, k, v, beta, log_decay, state, document_starts, torch.float64)
    repeated = (x.repeat_interleave(2, dim=1) for x in (q, k))
    expected = naive_recurrent_gated_delta_rule(*repeated, v, beta, log_decay, state, document_starts)
    for x, reference in zip(actual, expected, strict=True):
        assert (x - reference).abs().max() < EXACT
    grads, references = (
        torch.autograd.grad(sum(x.square().sum() for x in pair), leaves) for pair in (actual, expected)
    )
    for grad, reference in zip(grads, references, strict=True):
        assert (grad - reference).abs().max() < EXACT * reference.abs().max().clamp(min=10.0)


def test_auto_chooses_it_on_cuda_in_low_precision_with_a_decay_per_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "is_available", lambda: True)
    with FakeTensorMode():
        q, log_decay = torch.empty(1, 2, 64, 16, device="cuda"), torch.empty(1, 2, 64, device="cuda")
        by_channel = torch.empty(1, 2, 64, 16, device="cuda")
        assert fla.is_supported(q, log_decay, torch.bfloat16)
        assert fla.is_supported(q, None, torch.float16)
        assert not fla.is_supported(q, log_decay, torch.float32)
        assert not fla.is_supported(q, by_channel, torch.bfloat16)
        assert not fla.is_supported(torch.empty(1, 2, 63, 16, device="cuda"), log_decay, torch.bfloat16)
        assert not fla.is_supported(torch.empty(1, 2, 64, 16), log_decay, torch.bfloat16)
        monkeypatch.setattr(fla, "is_available", lambda: False)
        assert not fla.is_supported(q, log_decay, torch.bfloat16)
