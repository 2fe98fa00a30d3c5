"""What attention refuses before any work: shapes that do not fit, and what a backend cannot do."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.ops.attention.bias import RelativeBias, ScoreBias, bias_requires_grad
from memtx.ops.attention.mask import Visibility
from memtx.ops.cpu import attention

TRITON_HEAD_DIMS = (32, 64, 128)
"""Widths of a head that the Triton kernel is written for."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that it reads."""


@cache
def has_triton() -> bool:
    """Return whether the package triton is installed."""
    return find_spec("triton") is not None


def check_shapes(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None) -> None:
    """Raise unless the tensors, the visibility and the bias fit one another."""
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
    if q.shape[2] != visibility.num_queries or k.shape[2] != visibility.num_keys:
        raise MemtxError(
            f"The visibility is of {visibility.num_queries} queries and {visibility.num_keys} keys, "
            f"got {q.shape[2]} and {k.shape[2]}.",
            "Make it for these.",
        )
    if visibility.visible_from.shape[0] not in (1, q.shape[0]):
        raise MemtxError(
            f"The visibility is of {visibility.visible_from.shape[0]} rows, q of {q.shape[0]}.", "Make it for these."
        )
    if bias is not None and (bias.weight.shape[0] != q.shape[1] or bias.key_offset.shape[-1] != k.shape[2]):
        raise MemtxError(
            f"The bias is of {bias.weight.shape[0]} heads and {bias.key_offset.shape[-1]} keys, "
            f"attention of {q.shape[1]} and {k.shape[2]}.",
            "Make it for these.",
        )


def check_pattern(q: Tensor, visibility: Visibility) -> None:
    """Raise unless the visibility's pattern, if any, fits the queries."""
    pattern = visibility.pattern
    if pattern is None:
        return
    rows = (1, q.shape[0])
    for name, ticks in (("document_start", pattern.document_start), ("document_end", pattern.document_end)):
        if ticks.dim() != 2 or ticks.shape[0] not in rows or ticks.shape[1] != visibility.num_keys:
            raise MemtxError(
                f"The pattern's {name} is {tuple(ticks.shape)}, expected ({q.shape[0]} or 1, {visibility.num_keys}).",
                "Give a tick for each key.",
            )
    asked = pattern.global_queries
    if asked is not None and (asked.dim() != 2 or asked.shape[0] not in rows):
        raise MemtxError(
            f"The pattern's global queries are {tuple(asked.shape)}, expected ({q.shape[0]} or 1, any).",
            "Give each row the same number of ticks; a negative one stands for none.",
        )
    blocks = pattern.random_blocks
    if blocks is None:
        return
    if pattern.block_size < 1 or not 0 <= pattern.first_key <= visibility.num_keys:
        raise MemtxError(
            f"The pattern has blocks of {pattern.block_size} from key {pattern.first_key} on, "
            f"of {visibility.num_keys} keys.",
            "Give a size of at least 1 and a key that there is.",
        )
    expected = -(-visibility.num_queries // pattern.block_size)
    if blocks.dim() != 3 or blocks.shape[0] not in (1, q.shape[1]) or blocks.shape[1] != expected:
        raise MemtxError(
            f"The pattern's table of blocks is {tuple(blocks.shape)}, expected ({q.shape[1]} or 1, {expected}, any).",
            "Give each block of queries the same number of blocks; a negative one stands for none.",
        )


def check_backend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, dropout: float
) -> None:
    """Raise unless there is a backend of this name and it can do what is asked."""
    if backend not in ("reference", "banded", "cpp", "flex", "triton"):
        raise MemtxError(
            f"There is no attention backend '{backend}'.", "Use auto, reference, banded, cpp, flex or triton."
        )
    if backend == "reference":
        return
    if backend == "banded":
        return
    if dropout > 0.0:
        raise MemtxError(f"The backend '{backend}' has no attention dropout.", "Use 'banded', 'auto' or dropout 0.")
    if isinstance(bias, RelativeBias) or bias_requires_grad(bias):
        raise MemtxError(f"The backend '{backend}' has no bias that learns.", "Use 'banded', 'reference' or 'auto'.")
    if visibility.pattern is not None:
        raise MemtxError(
            f"The backend '{backend}' has no global queries and no random blocks.",
            "Use 'banded', 'reference' or 'auto'.",
        )
    if backend == "triton":
        _check_triton_kernel(q, bias)
        return
    if backend == "cpp":
        _check_cpp_kernel(q)
        return
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and gradient:
        raise MemtxError("The backend 'flex' has no gradient on the CPU.", "Use 'banded', 'auto' or torch.no_grad().")


def supports_cpp_kernel(q: Tensor) -> bool:
    """Return whether the compiled kernel is written for heads such as q's, where they are."""
    return q.device.type == "cpu" and q.dtype in attention.DTYPES and q.shape[-1] <= attention.MAX_HEAD_DIM


def _check_cpp_kernel(q: Tensor) -> None:
    if not supports_cpp_kernel(q):
        raise MemtxError(
            f"The backend 'cpp' got heads of {q.shape[-1]} in {q.dtype} on {q.device.type}, expected a width of "
            f"{attention.MAX_HEAD_DIM} at most in float32 or bfloat16 on the CPU.",
            "Use 'banded' or 'auto'.",
        )
    if not attention.is_available():
        raise MemtxError(
            "The backend 'cpp' could not be compiled on this machine.",
            "Install a C++ compiler (g++ or clang++), or use 'banded' or 'auto'.",
        )


def _check_triton_kernel(q: Tensor, bias: ScoreBias | None) -> None:
    if bias is not None:
        raise MemtxError("The backend 'triton' has no bias.", "Use 'flex', 'banded' or 'auto'.")
    if q.shape[-1] not in TRITON_HEAD_DIMS or q.dtype not in TRITON_DTYPES:
        raise MemtxError(
            f"The backend 'triton' got heads of {q.shape[-1]} in {q.dtype}, expected a width of 32, 64 or 128 in "
            "float32, bfloat16 or float16.",
            "Use 'flex', 'banded' or 'auto'.",
        )
    if not has_triton():
        raise MemtxError("The backend 'triton' needs the package triton, which is missing.", "pip install triton")
    from memtx.ops.attention import triton_window

    if not (q.is_cuda or triton_window.IS_INTERPRETED):
        raise MemtxError(f"The backend 'triton' got tensors on {q.device.type}.", "Move them to CUDA, or use 'auto'.")
