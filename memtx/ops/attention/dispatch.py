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

from memtx.ops.attention import banded, checks, flex, native, reference
from memtx.ops.attention.bias import Bias, RelativeBias, ScoreBias, learns
from memtx.ops.visibility import Visibility

Backend = Literal["auto", "reference", "banded", "native", "flex", "triton"]

log = logging.getLogger(__name__)

Watch = Callable[[Tensor, Visibility], None]
"""Told of a call's queries, (rows, heads, queries, head_dim), and who sees whom."""

_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Have every call inside told to ``watch``, for counting what attention costs; compiled models are not seen."""
    before = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(before)


@cache
def _say(backend: str, device: str, why: str) -> None:
    log.info("attention on %s runs by '%s': %s", device, backend, why)


def _choose(q: Tensor, visibility: Visibility, bias: ScoreBias | None, dropout: float) -> tuple[str, str]:
    if dropout > 0.0:
        return "banded", "dropout on attention weights is asked for"
    if learns(bias) or isinstance(bias, RelativeBias):
        return "banded", "the bias learns"
    if visibility.pattern is not None:
        return "banded", "some pairs are beside the lifetimes"
    if q.is_cuda and visibility.queries > 1 and q.dtype in checks.TRITON_TYPES:
        if bias is None and q.shape[-1] in checks.TRITON_WIDTHS and checks.has_triton():
            return "triton", "one kernel of our own that leaves out whole blocks"
        if q.shape[-1] >= 16:
            return "flex", "one compiled kernel that leaves out whole blocks"
    fits = checks.native_takes(q) and q.shape[2] >= native.FEWEST
    if fits and native.is_faster(q.dtype) and native.there():
        return "native", "one kernel of our own, compiled for this processor"
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
    backend: Backend = "auto",
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
    backend: Backend = "auto",
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
    backend: Backend = "auto",
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
    backend: Backend = "auto",
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
            can be joined by :func:`memtx.ops.attention.merge.merge`.

    Returns:
        (rows, heads, queries, head_dim), zero where a query sees nothing; on request also the log-sum-exp,
        (rows, heads, queries) in float32 at least (the reference's: in q's type), minus infinity there.

    Raises:
        MemtxError: the backend asked for cannot do what is asked, or shapes do not fit.
    """
    checks.shapes(q, k, v, visibility, bias)
    checks.pattern_fits(q, visibility)
    chosen, why = _choose(q, visibility, bias, dropout) if backend == "auto" else (backend, "asked for")
    checks.backend_can(chosen, q, k, v, visibility, bias, dropout)
    if not torch.compiler.is_compiling():  # A log line would cut the compiled graph in two.
        _say(chosen, q.device.type, why)
        if (watch := _WATCH.get()) is not None:
            watch(q, visibility)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor
    lse: Tensor | None
    if chosen == "reference":
        out, lse = reference.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale)
    elif chosen == "flex":
        assert isinstance(bias, Bias | None)
        out, lse = flex.attend(q, k, v, visibility, bias=bias, scale=scale)
    elif chosen == "native":
        assert isinstance(bias, Bias | None)
        out, lse = native.attend(q, k, v, visibility, bias=bias, scale=scale)
    elif chosen == "triton":
        from memtx.ops.attention import triton_window

        out, lse = triton_window.attend(q, k, v, visibility, scale=scale)
    else:
        out, lse = banded.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale, need_lse=return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
