"""The entry point of attention: check the inputs, choose a backend, log it once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from memtx.errors import MemtxError, check_divisible
from memtx.ops.attention import banded, flex, reference
from memtx.ops.attention.bias import AlibiBias, ExpireBias, RelativeBias, ScoreBias, is_unfused
from memtx.ops.attention.dilation import attend_dilated
from memtx.ops.attention.mask import SparsePattern, Visibility
from memtx.ops.attention.scores import DistanceScores
from memtx.ops.cpu import attention

AttentionBackend = Literal["auto", "reference", "banded", "cpp", "flex", "triton"]

AttentionHook = Callable[[Tensor, Visibility], None]
"""Called with the queries of an attention call, ``(batch, heads, queries, head_dim)``, and their visibility."""

# Arguments that the Triton kernel supports.
TRITON_HEAD_DIMS = (32, 64, 128)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HAS_TRITON = find_spec("triton") is not None

log = logging.getLogger(__name__)

_HOOK: ContextVar[AttentionHook | None] = ContextVar("attention_hook", default=None)


@contextlib.contextmanager
def use_attention_hook(hook: AttentionHook) -> Iterator[None]:
    """Call ``hook`` on every attention call in the context, for example to count its cost; compiled models skip it."""
    token = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(token)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility,
    *, bias: ScoreBias | None = None, dropout: float = 0.0, scale: float | None = None,
    backend: AttentionBackend = "auto", return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute softmax(scale * q k' + bias) v over the keys that each query sees.

    Args:
        q: ``(batch, heads, queries, head_dim)``.
        k: ``(batch, kv_heads, keys, head_dim)``; heads must be a multiple of kv_heads.
        v: ``(batch, kv_heads, keys, head_dim)``.
        visibility: Visibility of the keys.
        bias: Bias added to the scaled scores.
        dropout: Dropout rate of the attention weights; fused kernels do not support it.
        scale: Factor of the scores. Defaults to 1 / sqrt(head_dim).
        backend: Implementation. "auto" chooses by device and arguments.
        return_lse: If True, return the log-sum-exp of the scores, with gradient, for
            :func:`memtx.ops.attention.reference.merge_attention`.

    Returns:
        The output, ``(batch, heads, queries, head_dim)``, zero for fully masked queries, and the log-sum-exp, None
        unless ``return_lse`` is True: ``(batch, heads, queries)`` in float32 or wider (the reference's in the dtype of
        q), minus infinity for those queries.

    Raises:
        MemtxError: If shapes do not fit, or the backend does not support the arguments.
    """
    _check_shapes(q, k, v, visibility, bias)
    if visibility.dilated is not None and backend != "reference":

        def attend(
            q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None
        ) -> tuple[Tensor, Tensor | None]:
            return segment_attention(
                q, k, v, visibility, bias=bias, dropout=dropout, scale=scale, backend=backend, return_lse=return_lse
            )

        return attend_dilated(q, k, v, visibility, bias, attend)
    if visibility.pattern is not None:
        if isinstance(bias, DistanceScores):
            message = "Relative positions do not support global queries or random blocks."
            raise MemtxError(message, "Use rotary positions or ALiBi.")
        _check_pattern(q, visibility, visibility.pattern)
    if backend == "auto":
        name, reason = _choose_backend(q, visibility, bias, dropout)
    else:
        _check_backend(backend, q, k, v, visibility, bias, dropout)
        name, reason = backend, "requested"
    if torch.compiler.is_exporting():
        name = "reference" if name == "reference" else "banded"  # the others are kernels, which no program can hold
    if not torch.compiler.is_compiling():  # A log line would split the compiled graph.
        _log_backend(name, q.device.type, reason)
        if (hook := _HOOK.get()) is not None:
            hook(q, visibility)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lse: Tensor | None
    if name == "reference":
        out, lse = reference.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale)
    elif name == "banded":
        out, lse = banded.attend(q, k, v, visibility, bias=bias, dropout=dropout, scale=scale, return_lse=return_lse)
    elif name == "triton":
        from memtx.ops.attention import triton_window

        out, lse = triton_window.attend(q, k, v, visibility, scale=scale)
    else:
        assert isinstance(bias, AlibiBias | None)
        kernel = attention.attend if name == "cpp" else flex.attend
        out, lse = kernel(q, k, v, visibility, bias=bias, scale=scale)
    return out, lse if return_lse else None


def has_triton() -> bool:
    """Return True if the package triton is installed."""
    return _HAS_TRITON


def has_decode_kernel(q: Tensor, backend: AttentionBackend) -> bool:
    """Return True if one token per stream attends by :func:`memtx.ops.attention.triton_decode.attend_ring`."""
    if backend not in ("auto", "triton") or q.dtype not in TRITON_DTYPES or not has_triton():
        return False
    if q.is_cuda or backend == "auto":
        return q.is_cuda
    from memtx.ops.attention import triton_window

    return triton_window.IS_INTERPRETED


@cache
def _log_backend(backend: str, device: str, reason: str) -> None:
    log.info("Attention on %s uses the backend '%s' (%s).", device, backend, reason)


def _choose_backend(q: Tensor, visibility: Visibility, bias: ScoreBias | None, dropout: float) -> tuple[str, str]:
    """Return the backend for "auto" and the reason."""
    if feature := _find_unfused_feature(visibility, bias, dropout):
        return "banded", feature
    if q.is_cuda and visibility.num_queries > 1 and q.dtype in TRITON_DTYPES:
        if bias is None and q.shape[-1] in TRITON_HEAD_DIMS and has_triton():
            return "triton", "Triton kernel that skips masked blocks"
        if q.shape[-1] >= 16:
            return "flex", "compiled kernel that skips masked blocks"
    supported = _supports_cpp_kernel(q) and q.shape[2] >= attention.MIN_QUERIES
    if supported and attention.is_faster(q.dtype) and attention.is_available():
        return "cpp", "C++ kernel compiled for this CPU"
    return "banded", "fused calls on views, linear in length"


def _find_unfused_feature(visibility: Visibility, bias: ScoreBias | None, dropout: float) -> str | None:
    """Return a feature of the call that only 'banded' and 'reference' support, or None."""
    if dropout > 0.0:
        return "attention dropout"
    if isinstance(bias, DistanceScores):
        return "relative positions"
    if isinstance(bias, RelativeBias | ExpireBias) or is_unfused(bias):
        return "a learned bias"
    return "global queries or random blocks" if visibility.pattern is not None else None


def _supports_cpp_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in attention.DTYPES and q.shape[-1] <= attention.MAX_HEAD_DIM


def _check_backend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, dropout: float
) -> None:
    """Raise unless the backend exists and supports the call."""
    if backend in ("reference", "banded"):
        return
    if backend not in ("cpp", "flex", "triton"):
        hint = "Use auto, reference, banded, cpp, flex or triton."
        raise MemtxError(f"The attention backend '{backend}' does not exist.", hint)
    if feature := _find_unfused_feature(visibility, bias, dropout):
        raise MemtxError(f"The backend '{backend}' does not support {feature}.", "Use 'banded', 'reference' or 'auto'.")
    if backend == "triton":
        _check_triton(q, bias)
    elif backend == "cpp":
        if not _supports_cpp_kernel(q):
            expected = f"at most {attention.MAX_HEAD_DIM} in float32 or bfloat16 on the CPU"
            heads = f"heads of {q.shape[-1]} in {q.dtype} on {q.device.type}"
            raise MemtxError(f"The backend 'cpp' got {heads}, expected {expected}.", "Use 'banded' or 'auto'.")
        if not attention.is_available():
            hint = "Install a C++ compiler (g++ or clang++), or use 'banded' or 'auto'."
            raise MemtxError("The backend 'cpp' could not be compiled on this machine.", hint)
    elif q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise MemtxError("The backend 'flex' has no gradient on the CPU.", "Use 'banded', 'auto' or torch.no_grad().")


def _check_triton(q: Tensor, bias: ScoreBias | None) -> None:
    if bias is not None:
        raise MemtxError("The backend 'triton' does not support a bias.", "Use 'flex', 'banded' or 'auto'.")
    if q.shape[-1] not in TRITON_HEAD_DIMS or q.dtype not in TRITON_DTYPES:
        expected = "32, 64 or 128 in float32, bfloat16 or float16"
        message = f"The backend 'triton' got heads of {q.shape[-1]} in {q.dtype}, expected {expected}."
        raise MemtxError(message, "Use 'flex', 'banded' or 'auto'.")
    if not has_triton():
        raise MemtxError("The backend 'triton' needs the package triton.", "Install it: pip install triton.")
    if not q.is_cuda:
        from memtx.ops.attention import triton_window

        if not triton_window.IS_INTERPRETED:
            raise MemtxError(f"The backend 'triton' got tensors on {q.device.type}.", "Use CUDA tensors or 'auto'.")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None) -> None:
    """Raise unless the tensors, the visibility and the bias fit together."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise MemtxError(
            f"Attention got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}, expected q "
            "(batch, heads, queries, head_dim), k and v (batch, kv_heads, keys, head_dim).",
            "Transpose heads before tokens.",
        )
    if not q.dtype == k.dtype == v.dtype:
        raise MemtxError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}.", "Cast them to one dtype.")
    (batch_size, heads, queries, _), (_, kv_heads, keys, _) = q.shape, k.shape
    check_divisible("Choose a divisor of heads.", heads=heads, kv_heads=kv_heads)
    hint = "Create it for these tensors."
    if (dilated := visibility.dilated) is not None and len(dilated.distances) > heads:
        raise MemtxError(f"The dilated window has {len(dilated.distances)} heads, q has {heads}.", hint)
    if (queries, keys) != (visibility.num_queries, visibility.num_keys):
        size = f"{visibility.num_queries} queries and {visibility.num_keys} keys"
        raise MemtxError(f"The visibility has {size}, the tensors have {queries} and {keys}.", hint)
    if visibility.visible_from.shape[0] not in (1, batch_size):
        message = f"The visibility has a batch of {visibility.visible_from.shape[0]}, q of {batch_size}."
        raise MemtxError(message, hint)
    if isinstance(bias, ExpireBias):
        bias = bias.base
    if bias is not None and (bias.heads, bias.num_keys) != (heads, keys):
        size = f"{bias.heads} heads and {bias.num_keys} keys"
        raise MemtxError(f"The bias has {size}, the tensors have {heads} and {keys}.", hint)


def _check_pattern(q: Tensor, visibility: Visibility, pattern: SparsePattern) -> None:
    """Raise unless the pattern fits the queries and keys."""
    batch_size, heads, num_keys = q.shape[0], q.shape[1], visibility.num_keys
    for name in ("document_start", "document_end"):
        bound: Tensor = getattr(pattern, name)
        if bound.dim() != 2 or bound.shape[0] not in (1, batch_size) or bound.shape[1] != num_keys:
            message = f"The pattern's {name} is {tuple(bound.shape)}, expected ({batch_size} or 1, {num_keys})."
            raise MemtxError(message, "Pass one offset per key.")
    queries, blocks = pattern.global_queries, pattern.random_blocks
    if queries is not None and (queries.dim() != 2 or queries.shape[0] not in (1, batch_size)):
        message = f"The pattern's global_queries is {tuple(queries.shape)}, expected ({batch_size} or 1, any)."
        raise MemtxError(message, "Pad with -1 to equal lengths.")
    if blocks is None:
        return
    size, first_key = pattern.block_size, pattern.first_key
    if size < 1 or not 0 <= first_key <= num_keys:
        message = f"The pattern has block_size {size} and first_key {first_key} for {num_keys} keys."
        raise MemtxError(message, f"Use a block_size of at least 1 and a first_key from 0 to {num_keys}.")
    num_blocks = -(-visibility.num_queries // size)
    if blocks.dim() != 3 or blocks.shape[0] not in (1, heads) or blocks.shape[1] != num_blocks:
        message = f"The pattern's random_blocks is {tuple(blocks.shape)}, expected ({heads} or 1, {num_blocks}, any)."
        raise MemtxError(message, "Pad with -1 to equal lengths.")
