"""Gated DeltaNet between its projections: convolution, norms, gates, delta rule and gated norm of the reads.

In torch this is some fifty operations over intermediates as large as the projections; on the CPU in float32 and
bfloat16 a C++ kernel does it in one pass (:mod:`memtx.ops.cpu.gated_delta_net`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.cpu import gated_delta_net as cpu_gated_delta_net
from memtx.ops.delta_rule import gated_delta_rule


class DeltaNetWeights(NamedTuple):
    """Weights between the projections.

    Attributes:
        conv_weight: ``(channels, 1, conv_size)``, the current token last.
        decay_bias: ``(heads,)``, or ``(heads * key_dim,)`` for a decay per key channel.
        log_decay_rate: ``(heads,)``.
        norm_weight: ``(value_dim,)``.
    """

    conv_weight: Tensor
    decay_bias: Tensor
    log_decay_rate: Tensor
    norm_weight: Tensor


def gated_delta_net(
    qkv: Tensor, gate: Tensor, write: Tensor, decay: Tensor, conv_inputs: Tensor, state: Tensor, position: Tensor,
    valid_length: Tensor | None, weights: DeltaNetWeights, *, max_write: float = 1.0, norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a Gated DeltaNet (Yang et al. 2024, section 3.3), with the fastest implementation for device and dtype.

    Args:
        qkv: Queries and keys of the key heads and values of the heads, ``(batch, length, channels)``.
        gate: Inputs of the gate of the reads, ``(batch, length, heads * value_dim)``.
        write: Inputs of the write strengths, ``(batch, length, heads)``.
        decay: Inputs of the decays, ``(batch, length, heads)`` or ``(batch, length, heads * key_dim)``.
        conv_inputs: The last ``qkv`` before the first token, ``(batch, conv_size - 1, channels)``.
        state: Matrices before the first token, ``(batch, heads, key_dim, value_dim)``, float32 or wider.
        position: Positions of the tokens in their documents, ``(batch, length)`` int64; a document starts at 0.
        valid_length: ``(batch,)`` int64, tokens before the padding, which changes nothing. None without padding.
        weights: Weights between the projections.
        max_write: Largest write strength.
        norm_eps: Epsilon of the norm of the reads.

    Returns:
        Inputs of the output projection, ``(batch, length, heads * value_dim)``, in the dtype of ``gate``, and the
        matrices after the last token.
    """
    inputs = (qkv, gate, write, decay, conv_inputs, state, position, valid_length)
    by_head = decay.shape[-1] == state.shape[1]
    if by_head and cpu_gated_delta_net.is_supported(qkv, state) and cpu_gated_delta_net.is_available():
        return cpu_gated_delta_net.fused_gated_delta_net(*inputs, *weights, max_write=max_write, norm_eps=norm_eps)
    return plain_gated_delta_net(*inputs, weights, max_write=max_write, norm_eps=norm_eps)


def plain_gated_delta_net(
    qkv: Tensor, gate: Tensor, write: Tensor, decay: Tensor, conv_inputs: Tensor, state: Tensor, position: Tensor,
    valid_length: Tensor | None, weights: DeltaNetWeights, *, max_write: float = 1.0, norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute :func:`gated_delta_net` by torch operations."""
    key_dim = state.shape[2]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    mixed = convolve(conv_inputs.to(qkv.dtype), qkv, position, weights.conv_weight)
    q, k, v = split_qkv(mixed, state)
    beta, log_decay = compute_gates(write, decay, weights, key_dim, max_write)
    document_starts = position == 0
    if valid_length is not None:
        is_padding = (torch.arange(qkv.shape[1], device=qkv.device) >= valid_length[:, None])[:, None]
        beta = beta.masked_fill(is_padding, 0.0)
        document_starts = document_starts & ~is_padding[:, 0]
        log_decay = log_decay.masked_fill(is_padding if log_decay.dim() == 3 else is_padding[..., None], 0.0)
    q, k = normalize_address(q, dtype) * key_dim**-0.5, normalize_address(k, dtype)
    out, state = gated_delta_rule(
        q, k, v.to(dtype), beta, log_decay, state.to(dtype), document_starts, compute_dtype=qkv.dtype
    )
    reads = out.transpose(1, 2)
    return gate_reads(reads, gate, weights.norm_weight, norm_eps), state


def convolve(past: Tensor, inputs: Tensor, position: Tensor, weight: Tensor) -> Tensor:
    """Return ``SiLU`` of the causal convolution within each document; inputs: ``(batch, length, channels)``."""
    length, size = inputs.shape[1], weight.shape[2]
    padded = torch.cat([past, inputs], dim=1)
    out = inputs * weight[:, 0, -1]
    for lag in range(1, size):
        start = size - 1 - lag
        earlier = padded[:, start : start + length].masked_fill((position < lag)[..., None], 0.0)
        out = torch.addcmul(out, earlier, weight[:, 0, start])
    return F.silu(out)


def split_qkv(mixed: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``(batch, length, channels)`` into queries, keys and values, ``(batch, heads, length, width)``."""
    heads, key_dim, value_dim = state.shape[1:]
    num_keys = (mixed.shape[-1] - heads * value_dim) // 2
    parts = torch.split(mixed, [num_keys, num_keys, heads * value_dim], dim=-1)
    q, k, v = (_split_heads(x, width) for x, width in zip(parts, (key_dim, key_dim, value_dim), strict=True))
    return q, k, v


def _split_heads(x: Tensor, width: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, width).transpose(1, 2)


def compute_gates(
    write: Tensor, decay: Tensor, weights: DeltaNetWeights, key_dim: int, max_write: float
) -> tuple[Tensor, Tensor]:
    """Return the write strengths and log decays, ``(batch, heads, length)``, decays by channel with key_dim behind.

    Both are in float32 or wider.
    """
    dtype = torch.promote_types(write.dtype, torch.float32)
    beta = torch.sigmoid(write.to(dtype)).mT
    step = F.softplus(decay.to(dtype) + weights.decay_bias)
    rate = -weights.log_decay_rate.to(dtype).exp()
    by_head = step.shape[-1] == len(rate)
    log_decay = (step * rate).mT if by_head else _split_heads(step, key_dim) * rate[:, None, None]
    return beta if max_write == 1.0 else beta * max_write, log_decay


def normalize_address(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return queries or keys ``(..., key_dim)`` with norm 1."""
    x = x.to(dtype)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gate_reads(reads: Tensor, gate: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Normalize reads ``(..., heads, value_dim)``, and gate them by ``gate`` ``(..., heads * value_dim)``."""
    normalized = F.rms_norm(reads.to(norm_weight.dtype), norm_weight.shape, norm_weight, eps).flatten(-2)
    return normalized.to(gate.dtype) * F.silu(gate)
