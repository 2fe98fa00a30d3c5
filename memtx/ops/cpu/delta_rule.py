"""The gated delta rule on the CPU by a C++ kernel (``delta_rule.cpp``), forward and backward.

It goes by chunks whose matrices stay in the L1 and L2 caches (with a decay per channel token by token), where the form
in torch runs some thirty operations a chunk. Both passes are custom operators, so ``torch.compile`` does not break the
graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "delta_rule.cpp"
CHECKPOINT_INTERVALS = {False: 128, True: 32}
"""Tokens between two matrices that are stored for the backward pass, with a decay per channel or not."""

WIDTH_MULTIPLE = 16
"""Key and value widths are padded to a multiple of this for a decay per channel."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return True if the kernel runs on this machine; the first call compiles it if needed."""
    return cpp_extension.is_available(SOURCE_PATH)


def _call_kernel(name: str, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor, ...], *sizes: int) -> None:
    """Call a function of the source with addresses, sizes and the strides of ``(batch, heads, length, ...)``."""
    strides = [stride for x in strided for stride in x.stride()[:3]]
    cpp_extension.call(SOURCE_PATH, name, *tensors, (*sizes, torch.get_num_threads()), strides)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.dim() == 3 else x.contiguous()


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor | None, delta_rule: bool) -> tuple[int, ...]:
    decay_dim = 0 if log_decay is None else 1 if log_decay.dim() == 3 else q.shape[3]
    return (q.shape[0], v.shape[1], q.shape[1], q.shape[2], q.shape[3], v.shape[3], decay_dim, delta_rule)


@torch.library.custom_op("memtx::cpu_delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    delta_rule: bool, keep_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_unit_stride, (q, k, v))
    log_decay = None if log_decay is None else _unit_stride(log_decay)
    out, next_state, checkpoints = _empty_outputs(v, log_decay, state, keep_checkpoints)
    decay = beta if log_decay is None else log_decay
    _call_kernel(
        "memtx_delta_rule_forward",
        (q, k, v, beta, log_decay, document_starts.contiguous(), state.contiguous(), out, next_state,
         checkpoints if keep_checkpoints else None),
        (q, k, v, beta, decay, out), *_sizes(q, v, log_decay, delta_rule),
    )  # fmt: skip
    return out, next_state, checkpoints


def _empty_outputs(
    v: Tensor, log_decay: Tensor | None, state: Tensor, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the empty outputs; heads are next to each other in memory, as the layer's output needs them."""
    batch_size, heads, length, value_dim = v.shape
    interval = CHECKPOINT_INTERVALS[log_decay is not None and log_decay.dim() == 4]
    num_chunks = -(-length // interval) if keep_checkpoints else 0
    return (
        v.new_empty(batch_size, length, heads, value_dim).transpose(1, 2),
        torch.empty_like(state, memory_format=torch.contiguous_format),
        state.new_empty(batch_size, heads, num_chunks, *state.shape[2:]),
    )


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    delta_rule: bool, keep_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(v, log_decay, state, keep_checkpoints)


@torch.library.custom_op("memtx::cpu_delta_rule_backward", mutates_args=())
def _backward(
    grad_out: Tensor, grad_next: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    document_starts: Tensor, checkpoints: Tensor, delta_rule: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, grad_out = map(_unit_stride, (q, k, v, grad_out))
    log_decay = None if log_decay is None else _unit_stride(log_decay)
    grads = _zero_grads(q, k, v, beta, log_decay, grad_next)
    decay = beta if log_decay is None else log_decay
    _call_kernel(
        "memtx_delta_rule_backward",
        (q, k, v, beta, log_decay, document_starts.contiguous(), checkpoints, grad_out, grad_next.contiguous(), *grads),
        (q, k, v, beta, decay, grad_out, *grads[:4], grads[4] if log_decay is not None else grads[3]),
        *_sizes(q, v, log_decay, delta_rule),
    )
    return grads


def _zero_grads(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta, log_decay (empty without decay) and the state, zeros to add to."""
    grad_q, grad_k = (x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
    grad_v = v.new_empty(v.transpose(1, 2).shape).transpose(1, 2)
    grad_decay = beta.new_zeros(0 if log_decay is None else log_decay.shape)
    return grad_q, grad_k, grad_v, beta.new_zeros(beta.shape), grad_decay, state.new_empty(state.shape)


@_backward.register_fake
def _(
    grad_out: Tensor, grad_next: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _zero_grads(q, k, v, beta, log_decay, grad_next)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, log_decay, _, document_starts, ctx.delta_rule, _ = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, document_starts, output[2])


def _autograd_backward(ctx: Any, grad_out: Tensor, grad_next: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, checkpoints = ctx.saved_tensors
    *grads, grad_decay, grad_state = _backward(grad_out, grad_next, *inputs, checkpoints, ctx.delta_rule)
    return *grads, None if inputs[4] is None else grad_decay, grad_state, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, document_starts: Tensor,
    *, delta_rule: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`memtx.ops.delta_rule.gated_delta_rule` in float32, with gradients."""
    key_dim, value_dim = q.shape[3], v.shape[3]
    key_padding, value_padding = -key_dim % WIDTH_MULTIPLE, -value_dim % WIDTH_MULTIPLE
    if log_decay is not None and log_decay.dim() == 4 and (key_padding or value_padding):
        q, k, v = F.pad(q, (0, key_padding)), F.pad(k, (0, key_padding)), F.pad(v, (0, value_padding))
        state = F.pad(state, (0, value_padding, 0, key_padding))
        log_decay = F.pad(log_decay, (0, key_padding))
    inputs = (q, k, v, beta, log_decay, state)
    keep_checkpoints = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, next_state, _ = _forward(*inputs, document_starts, delta_rule, keep_checkpoints)
    return out[..., :value_dim], next_state[..., :key_dim, :value_dim]
