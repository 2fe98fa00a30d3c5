"""Gated DeltaNet between its projections by a C++ kernel (``gated_delta_net.cpp``), forward and backward.

Nothing between the projections and the output is stored: the backward pass computes it again from the projections and
one matrix in 128 tokens. Computed in float32 also for bfloat16; both passes are custom operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "gated_delta_net.cpp"
DTYPES = (torch.float32, torch.bfloat16)
CHECKPOINT_INTERVAL = 128
"""Tokens between two matrices that are stored for the backward pass, as in the source."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return True if the kernel runs on this machine; the first call compiles it if needed."""
    return cpp_extension.is_available(SOURCE_PATH)


def is_supported(qkv: Tensor, state: Tensor) -> bool:
    """Return True if the kernel computes these: on the CPU, in float32 or bfloat16, the state in float32."""
    return qkv.device.type == "cpu" and qkv.dtype in DTYPES and state.dtype == torch.float32


def _call_kernel(
    name: str, tensors: Sequence[Tensor | None], qkv: Tensor, state: Tensor, conv_size: int, options: list[float]
) -> None:
    """Call a function of the source with the fields of its ``Tensors``, ``Sizes`` and ``Options``."""
    heads, key_dim, value_dim = state.shape[1:]
    key_heads = (qkv.shape[2] - heads * value_dim) // (2 * key_dim)
    sizes = (*qkv.shape[:2], heads, key_heads, key_dim, value_dim, conv_size, torch.get_num_threads())
    cpp_extension.call(SOURCE_PATH, name, tensors, sizes, options)


def _to_kernel_layout(tensors: Sequence[Tensor], conv_weight: int) -> list[Tensor]:
    """Return contiguous float32 tensors; that at index ``conv_weight`` with channels last."""
    return [
        (x[:, 0].T if index == conv_weight else x).to(torch.float32).contiguous() for index, x in enumerate(tensors)
    ]


def _empty_outputs(gate: Tensor, state: Tensor, keep_checkpoints: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_intervals = -(-gate.shape[1] // CHECKPOINT_INTERVAL) if keep_checkpoints else 0
    # As the kernel numbers them: intervals within a head.
    checkpoints = state.new_empty(*state.shape[:2], num_intervals, *state.shape[2:])
    return gate.new_empty(gate.shape), state.new_empty(state.shape), checkpoints


@torch.library.custom_op("memtx::cpu_gated_delta_net", mutates_args=())
def _forward(
    qkv: Tensor, gate: Tensor, write: Tensor, decay: Tensor, conv_inputs: Tensor, state: Tensor, conv_weight: Tensor,
    decay_bias: Tensor, log_decay_rate: Tensor, norm_weight: Tensor, position: Tensor, valid_length: Tensor | None,
    options: list[float], keep_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, next_state, checkpoints = _empty_outputs(gate, state, keep_checkpoints)
    wide = out if out.dtype == torch.float32 else out.float()
    inputs = (qkv, gate, write, decay, conv_inputs, state, conv_weight, decay_bias, log_decay_rate, norm_weight)
    tensors = (
        *_to_kernel_layout(inputs, 6), position.contiguous(), valid_length, wide, next_state,
        checkpoints if keep_checkpoints else None,
    )  # fmt: skip
    _call_kernel("memtx_gated_delta_net_forward", tensors, qkv, state, conv_weight.shape[2], options)
    return wide.to(out.dtype), next_state, checkpoints


@_forward.register_fake
def _(qkv: Tensor, gate: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(gate, inputs[3], inputs[-1])


@torch.library.custom_op("memtx::cpu_gated_delta_net_backward", mutates_args=())
def _backward(
    grad_out: Tensor, grad_next: Tensor, qkv: Tensor, gate: Tensor, write: Tensor, decay: Tensor, conv_inputs: Tensor,
    state: Tensor, conv_weight: Tensor, decay_bias: Tensor, log_decay_rate: Tensor, norm_weight: Tensor,
    position: Tensor, valid_length: Tensor | None, checkpoints: Tensor, options: list[float],
) -> list[Tensor]:  # fmt: skip
    inputs = (qkv, gate, write, decay, conv_inputs, state, conv_weight, decay_bias, log_decay_rate, norm_weight)
    wide = _to_kernel_layout(inputs, 6)
    batch_size, heads = state.shape[:2]
    grads = [torch.zeros_like(x) for x in wide[:5]]
    grads.append(grad_next.to(torch.float32).clone(memory_format=torch.contiguous_format))
    # Threads add to parts of their own.
    weight_grads = [x.new_zeros(batch_size, *x.shape) for x in wide[6:9]]
    weight_grads.append(wide[9].new_zeros(batch_size * heads, norm_weight.shape[0]))
    tensors = (
        *wide, position.contiguous(), valid_length, None, None, checkpoints,
        grad_out.to(torch.float32).contiguous(), *grads, *weight_grads,
    )  # fmt: skip
    _call_kernel("memtx_gated_delta_net_backward", tensors, qkv, state, conv_weight.shape[2], options)
    weight_grads = [grad.sum(0) for grad in weight_grads]
    weight_grads[0] = weight_grads[0].T[:, None].contiguous()
    return [grad.to(x.dtype) for grad, x in zip((*grads, *weight_grads), inputs, strict=True)]


@_backward.register_fake
def _(grad_out: Tensor, grad_next: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:10]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.options, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _autograd_backward(ctx: Any, grad_out: Tensor, grad_next: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad_out, grad_next, *ctx.saved_tensors, ctx.options)
    return *grads, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def fused_gated_delta_net(
    qkv: Tensor, gate: Tensor, write: Tensor, decay: Tensor, conv_inputs: Tensor, state: Tensor, position: Tensor,
    valid_length: Tensor | None, *weights: Tensor, max_write: float, norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`memtx.ops.gated_delta_net.gated_delta_net` with a decay per head, with gradients."""
    inputs = (qkv, gate, write, decay, conv_inputs, state, *weights)
    keep_checkpoints = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    options = [max_write, norm_eps]
    out, next_state, _ = _forward(*inputs, position, valid_length, options, keep_checkpoints)
    return out, next_state
