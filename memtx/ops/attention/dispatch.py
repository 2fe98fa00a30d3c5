"""The one entry to attention: picks a backend, says which once, refuses before any work."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.ops.attention import banded, flex, reference
from memtx.ops.attention.bias import Bias
from memtx.ops.visibility import Visibility

Backend = Literal["auto", "reference", "banded", "flex"]

log = logging.getLogger(__name__)


@cache
def _say(backend: str, device: str, why: str) -> None:
    log.info("attention on %s runs by '%s': %s", device, backend, why)


def _choose(q: Tensor, visibility: Visibility, bias: Bias | None, dropout: float) -> tuple[str, str]:
    if dropout > 0.0:
        return "reference", "dropout on attention weights is asked for"
    if bias is not None and bias.slopes.requires_grad:
        return "reference", "the bias learns"
    if q.is_cuda and visibility.queries > 1 and q.shape[-1] >= 16:
        return "flex", "one compiled kernel that leaves out whole blocks"
    return "banded", "fused calls over views, linear in length"


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Bias | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise MemtxError(
            f"Attention got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected "
            "(rows, heads, queries, head_dim) and twice (rows, kv_heads, keys, head_dim).",
            "Transpose heads before entries.",
        )
    if not q.dtype == k.dtype == v.dtype:
        raise MemtxError(f"Attention got q, k, v of {q.dtype}, {k.dtype}, {v.dtype}.", "Give all three in one type.")
    if q.shape[1] % k.shape[1]:
        raise MemtxError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads.", "Make the latter divide the former."
        )
    if q.shape[2] != visibility.queries or k.shape[2] != visibility.keys:
        raise MemtxError(
            f"The visibility is of {visibility.queries} queries and {visibility.keys} keys, "
            f"got {q.shape[2]} and {k.shape[2]}.",
            "Make it for these.",
        )
    if visibility.born.shape[0] not in (1, q.shape[0]):
        raise MemtxError(
            f"The visibility is of {visibility.born.shape[0]} rows, q of {q.shape[0]}.", "Make it for these."
        )
    if bias is not None and (bias.slopes.shape != q.shape[1:2] or bias.tick.shape[-1] != k.shape[2]):
        raise MemtxError(
            f"The bias is of {bias.slopes.shape[0]} heads and {bias.tick.shape[-1]} keys, "
            f"attention of {q.shape[1]} and {k.shape[2]}.",
            "Make it for these.",
        )


def _check_backend(chosen: str, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, dropout: float) -> None:
    if chosen not in ("reference", "banded", "flex"):
        raise MemtxError(f"There is no attention backend '{chosen}'.", "Use auto, reference, banded or flex.")
    if chosen == "reference":
        return
    if dropout > 0.0:
        raise MemtxError(f"The backend '{chosen}' has no attention dropout.", "Use 'reference', 'auto' or dropout 0.")
    if bias is not None and bias.slopes.requires_grad:
        raise MemtxError(f"The backend '{chosen}' gives slopes no gradient.", "Use 'reference' or fixed slopes.")
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if chosen == "flex" and q.device.type == "cpu" and learns:
        raise MemtxError("The backend 'flex' has no gradient on the CPU.", "Use 'banded', 'auto' or torch.no_grad().")


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Bias | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return softmax(scale * q k' + bias) v over the keys that each query sees.

    Args:
        q: (rows, heads, queries, head_dim).
        k: (rows, kv_heads, keys, head_dim); heads must be a multiple of kv_heads.
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom.
        bias: added to the scaled scores.
        dropout: probability with which an attention weight is dropped.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        backend: which implementation; "auto" chooses by device and need.

    Returns:
        (rows, heads, queries, head_dim), zero where a query sees nothing.

    Raises:
        MemtxError: the backend asked for cannot do what is asked, or shapes do not fit.
    """
    _check_shapes(q, k, v, visibility, bias)
    chosen, why = _choose(q, visibility, bias, dropout) if backend == "auto" else (backend, "asked for")
    _check_backend(chosen, q, k, v, bias, dropout)
    _say(chosen, q.device.type, why)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return reference.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale)[0]
    if chosen == "flex":
        return flex.attend(q, k, v, visibility, bias=bias, scale=scale)[0]
    return banded.attend(q, k, v, visibility, bias=bias, scale=scale)[0]
