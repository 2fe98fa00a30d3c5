"""Copied probabilities on the CPU by a C++ kernel (``copying.cpp``), which stores no weights for the backward pass.

Both passes are custom operators, so ``torch.compile`` does not break the graph.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.mask import Visibility, get_int32_bounds
from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "copying.cpp"
BLOCK_SIZE = 32
"""Queries per block, as in the source; their number is padded to a multiple."""

WIDTH_MULTIPLE = 16
"""Key widths are padded to a multiple of this."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return True if the kernel runs on this machine; the first call compiles it if needed."""
    return cpp_extension.is_available(SOURCE_PATH)


def _call_kernel(
    name: str, q: Tensor, keys: Tensor, visible_from: Tensor, first_key: int, tensors: tuple[Tensor | None, ...]
) -> None:
    """Call a function of the source with addresses and sizes."""
    interval_stride = keys.shape[1] if visible_from.shape[0] > 1 else 0
    sizes = (*q.shape[:2], *keys.shape[1:], first_key, interval_stride, torch.get_num_threads())
    # Queries in base 2 as the lanes of vectors.
    columns = (q * math.log2(math.e)).mT.contiguous()
    cpp_extension.call(SOURCE_PATH, name, columns, keys, *tensors, sizes)


@torch.library.custom_op("memtx::cpu_copying", mutates_args=())
def _forward(
    q: Tensor, past_keys: Tensor, keys: Tensor, next_tokens: Tensor, labels: Tensor, visible_from: Tensor,
    visible_until: Tensor, needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    all_keys = torch.cat([past_keys, keys], dim=1)
    copied, best, lse, direction = _empty_outputs(q, needs_grad)
    inputs = (next_tokens.contiguous(), labels.contiguous(), visible_from.contiguous(), visible_until.contiguous())
    outputs = (copied, best, lse, direction if needs_grad else None)
    _call_kernel("memtx_copying_forward", q, all_keys, visible_from, 0, (*inputs, *outputs))
    return copied, best, lse, direction


def _empty_outputs(q: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = q.new_empty(q.shape[:2])
    direction = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_grad else q.new_empty(0)
    return row, torch.empty_like(row), torch.empty_like(row), direction


@_forward.register_fake
def _(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(q, inputs[-1])


@torch.library.custom_op("memtx::cpu_copying_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, past_keys: Tensor, keys: Tensor, next_tokens: Tensor, labels: Tensor,
    visible_from: Tensor, visible_until: Tensor, copied: Tensor, lse: Tensor, first_key: int,
) -> Tensor:  # fmt: skip
    all_keys = torch.cat([past_keys, keys], dim=1)
    grad_keys = q.new_empty(q.shape[0], all_keys.shape[1] - first_key, q.shape[2])
    inputs = (next_tokens.contiguous(), labels.contiguous(), visible_from.contiguous(), visible_until.contiguous())
    saved = (q.contiguous(), copied, lse, grad.contiguous())
    _call_kernel("memtx_copying_backward", q, all_keys, visible_from, first_key, (*inputs, *saved, grad_keys))
    return grad_keys


@_backward.register_fake
def _(grad: Tensor, q: Tensor, past_keys: Tensor, keys: Tensor, *inputs: Any) -> Tensor:
    return q.new_empty(q.shape[0], past_keys.shape[1] + keys.shape[1] - inputs[-1], q.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    copied, _, lse, direction = output
    ctx.save_for_backward(*inputs[:-1], copied, lse, direction)


def _autograd_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, copied, lse, direction = ctx.saved_tensors
    num_past = inputs[1].shape[1]
    first_key = 0 if ctx.needs_input_grad[1] else num_past
    grad_keys = _backward(grad, *inputs, copied, lse, first_key)
    grad_past = grad_keys[:, :num_past] if first_key == 0 else None
    return grad[..., None] * direction, grad_past, grad_keys[:, num_past - first_key :], *(None,) * 5


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def copied_probability(
    q: Tensor, past_keys: Tensor, keys: Tensor, next_tokens: Tensor, labels: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Compute :func:`memtx.ops.copying.copied_probability` in float32, with gradients."""
    length = q.shape[1]
    extra_queries, extra_width = -length % BLOCK_SIZE, -q.shape[2] % WIDTH_MULTIPLE
    if extra_width:
        q, past_keys, keys = (F.pad(x, (0, extra_width)) for x in (q, past_keys, keys))
    if extra_queries:
        q, labels = F.pad(q, (0, 0, 0, extra_queries)), F.pad(labels, (0, extra_queries), value=-1)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, past_keys, keys))
    tokens = (next_tokens.to(torch.int32), labels.to(torch.int32))
    copied, best, *_ = _forward(q, past_keys, keys, *tokens, *get_int32_bounds(visibility), needs_grad)
    return copied[:, :length], best[:, :length].detach()
