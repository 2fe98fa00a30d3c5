"""The one entry to attention: picks a backend, says which once, refuses before any work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor

from memtx.ops.attention import banded, checks, flex, reference
from memtx.ops.attention.bias import AlibiBias, RelativeBias, ScoreBias, bias_requires_grad
from memtx.ops.attention.mask import Visibility
from memtx.ops.cpu import attention

AttentionBackend = Literal["auto", "reference", "banded", "cpp", "flex", "triton"]

log = logging.getLogger(__name__)

AttentionHook = Callable[[Tensor, Visibility], None]
"""Told of a call's queries, (rows, heads, queries, head_dim), and who sees whom."""

_HOOK: ContextVar[AttentionHook | None] = ContextVar("attention_hook", default=None)


@contextlib.contextmanager
def use_attention_hook(hook: AttentionHook) -> Iterator[None]:
    """Have every call inside told to ``hook``, for counting what attention costs; compiled models are not seen."""
    before = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(before)


@cache
def _log_backend(backend: str, device: str, reason: str) -> None:
    log.info("attention on %s runs by '%s': %s", device, backend, reason)


def _choose_backend(q: Tensor, visibility: Visibility, bias: ScoreBias | None, dropout: float) -> tuple[str, str]:
    if dropout > 0.0:
        return "banded", "dropout on attention weights is asked for"
    if bias_requires_grad(bias) or isinstance(bias, RelativeBias):
        return "banded", "the bias learns"
    if visibility.pattern is not None:
        return "banded", "some pairs are beside the lifetimes"
    if q.is_cuda and visibility.num_queries > 1 and q.dtype in checks.TRITON_DTYPES:
        if bias is None and q.shape[-1] in checks.TRITON_HEAD_DIMS and checks.has_triton():
            return "triton", "one kernel of our own that leaves out whole blocks"
        if q.shape[-1] >= 16:
            return "flex", "one compiled kernel that leaves out whole blocks"
    fits = checks.supports_cpp_kernel(q) and q.shape[2] >= attention.MIN_QUERIES
    if fits and attention.is_faster(q.dtype) and attention.is_available():
        return "cpp", "one kernel of our own, compiled for this processor"
    return "banded", "fused calls over views, linear in length"


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: ScoreBias | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale * q k' + bias) v over the keys that each query sees.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim); heads must be a multiple of kv_heads.
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores.
        dropout: probability with which an attention weight is dropped; by no fused kernel.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        backend: which implementation; "auto" chooses by device and need.
        return_lse: whether to give the log-sum-exp of the scores too, with gradient, so that parts of the keys
            can be joined by :func:`memtx.ops.attention.combine.merge_attention`.

    Returns:
        (rows, heads, queries, head_dim), zero where a query sees nothing; on request also the log-sum-exp,
        (rows, heads, queries) in float32 at least (the reference's: in q's type), minus infinity there.

    Raises:
        MemtxError: the backend asked for cannot do what is asked, or shapes do not fit.
    """
    checks.check_shapes(q, k, v, visibility, bias)
    checks.check_pattern(q, visibility)
    chosen, why = _choose_backend(q, visibility, bias, dropout) if backend == "auto" else (backend, "asked for")
    checks.check_backend(chosen, q, k, v, visibility, bias, dropout)
    if not torch.compiler.is_compiling():  # A log line would cut the compiled graph in two.
        _log_backend(chosen, q.device.type, why)
        if (watch := _HOOK.get()) is not None:
            watch(q, visibility)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor
    lse: Tensor | None
    if chosen == "reference":
        out, lse = reference.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale)
    elif chosen == "flex":
        assert isinstance(bias, AlibiBias | None)
        out, lse = flex.attend(q, k, v, visibility, bias=bias, scale=scale)
    elif chosen == "cpp":
        assert isinstance(bias, AlibiBias | None)
        out, lse = attention.attend(q, k, v, visibility, bias=bias, scale=scale)
    elif chosen == "triton":
        from memtx.ops.attention import triton_window

        out, lse = triton_window.attend(q, k, v, visibility, scale=scale)
    else:
        out, lse = banded.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale, need_lse=return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
