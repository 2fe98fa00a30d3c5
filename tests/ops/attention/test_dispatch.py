"""The entry point of attention: argument checks, choice of a backend, and its log line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memtx.errors import MemtxError
from memtx.ops.attention import banded, dispatch, flex, reference
from memtx.ops.attention.bias import AlibiBias, RelativeBias
from memtx.ops.attention.dispatch import segment_attention
from memtx.ops.attention.mask import SparsePattern
from tests.ops.attention.test_backends import VISIBILITY, Q, causal_window


@pytest.mark.parametrize(
    ("q", "k", "options", "message"),
    [
        (Q, torch.randn(2, 3, 10, 8), {}, r"heads \(4\) must be divisible by kv_heads \(3\)"),
        (Q[:, :, :9], Q, {}, "has 10 queries and 10 keys, the tensors have 9 and 10"),
        (Q, Q[:, :, :9], {}, "has 10 queries and 10 keys, the tensors have 10 and 9"),
        (Q, Q[..., :4], {}, "expected"),
        (Q[0], Q[0], {}, "expected"),
        (Q[:1], Q, {}, "expected"),
        (Q, Q.double(), {}, "Cast them to one dtype"),
        (Q, Q, {"backend": "fast"}, "attention backend 'fast' does not exist"),
        (Q, Q, {"backend": "flex", "dropout": 0.1}, "'flex' does not support attention dropout"),
        (Q.clone().requires_grad_(), Q, {"backend": "flex"}, "no gradient on the CPU"),
        (Q, Q, {"bias": AlibiBias(torch.ones(3), VISIBILITY.visible_from.double())}, "3 heads"),
        (
            Q,
            Q,
            {"bias": AlibiBias(torch.ones(4).requires_grad_(), VISIBILITY.visible_from.double()), "backend": "flex"},
            "'flex' does not support a learned bias",
        ),
        (
            Q,
            Q,
            {"bias": RelativeBias(torch.ones(4, 3), VISIBILITY.visible_from.double()), "backend": "triton"},
            "'triton' does not support a learned bias",
        ),
        (
            Q,
            Q,
            {"bias": AlibiBias(torch.ones(4), VISIBILITY.visible_from.double()), "backend": "triton"},
            "'triton' does not support a bias",
        ),
        (Q, Q, {"backend": "triton"}, "got heads of 8 in torch.float32"),
    ],
)
def test_bad_arguments_raise_before_any_work(
    q: Tensor, k: Tensor, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a backend was called")

    for backend in (reference, banded, flex):
        monkeypatch.setattr(backend, "attend", fail)
    with pytest.raises(MemtxError, match=message):
        segment_attention(q, k, k, VISIBILITY, **options)  # type: ignore[arg-type]


def test_batch_size_of_the_visibility_must_fit() -> None:
    with pytest.raises(MemtxError, match="batch of 3, q of 2"):
        segment_attention(Q, Q, Q, causal_window(10, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_start": torch.zeros(1, 9)}, r"document_start is \(1, 9\), expected \(2 or 1, 10\)"),
        ({"document_end": torch.zeros(3, 10)}, r"document_end is \(3, 10\)"),
        ({"global_queries": torch.zeros(3, 1)}, r"global_queries is \(3, 1\)"),
        (
            {"random_blocks": torch.zeros(1, 2, 1), "block_size": 4},
            r"random_blocks is \(1, 2, 1\), expected \(4 or 1, 3, any\)",
        ),
        ({"random_blocks": torch.zeros(1, 3, 1), "block_size": 0}, "block_size 0"),
        ({"random_blocks": torch.zeros(1, 3, 1), "block_size": 4, "first_key": 11}, "first_key 11 for 10 keys"),
        ({"backend": "flex"}, "does not support global queries or random blocks"),
    ],
)
def test_patterns_with_wrong_shapes_or_sizes_raise(options: dict[str, Any], message: str) -> None:
    backend = options.pop("backend", "auto")
    pattern = replace(SparsePattern(torch.zeros(1, 10), torch.full((1, 10), 10)), **options)
    with pytest.raises(MemtxError, match=message):
        segment_attention(Q, Q, Q, replace(VISIBILITY, pattern=pattern), backend=backend)


def test_auto_chooses_the_fastest_backend_on_a_gpu() -> None:
    """Uses fake CUDA tensors."""
    with FakeTensorMode():
        q = {head_dim: torch.empty(1, 2, 10, head_dim, device="cuda") for head_dim in (8, 64, 80)}
    bias = AlibiBias(torch.ones(2), VISIBILITY.visible_from.double())
    fastest = "triton" if dispatch.has_triton() else "flex"
    assert dispatch._choose_backend(q[64], VISIBILITY, None, 0.0)[0] == fastest
    assert dispatch._choose_backend(q[64], VISIBILITY, bias, 0.0)[0] == "flex"
    assert dispatch._choose_backend(q[80], VISIBILITY, None, 0.0)[0] == "flex"
    assert dispatch._choose_backend(q[8], VISIBILITY, None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64].double(), VISIBILITY, None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64], replace(VISIBILITY, num_queries=1), None, 0.0)[0] == "banded"
    assert dispatch._choose_backend(q[64], VISIBILITY, None, 0.1)[0] == "banded"


def test_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_backend.cache_clear()
    with caplog.at_level("INFO", logger=dispatch.__name__):
        for _ in range(3):
            segment_attention(Q, Q, Q, VISIBILITY)
    assert [record.getMessage() for record in caplog.records] == [
        "Attention on cpu uses the backend 'banded' (fused calls on views, linear in length)."
    ]
