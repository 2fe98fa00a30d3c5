"""Gated DeltaNet (Yang et al. 2024, section 3.3), as in Qwen 3.5: a layer whose memory is one matrix per head.

It takes the place of attention. Queries, keys and values pass a short causal convolution; the matrix is written and
read at every token by the gated delta rule, and the normalized reads are gated (:mod:`memtx.ops.gated_delta_net`). With
a decay per key channel it is Kimi Delta Attention (Kimi Linear, Kimi Team 2025, section 3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_divisible
from memtx.memory.base import ContentAttention, Memory, View
from memtx.memory.recurrent import update_cache
from memtx.ops.cpu.linear import Linear
from memtx.ops.cpu.token_chunks import split_without_grad
from memtx.ops.gated_delta_net import (
    DeltaNetWeights,
    compute_gates,
    gate_reads,
    gated_delta_net,
    normalize_address,
    split_qkv,
)
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class GatedDeltaNetState:
    """The matrices and the last inputs of the convolution.

    Attributes:
        matrix: Memory of each head, ``(batch, heads, key_dim, value_dim)``, float32 or wider.
        conv_inputs: Last inputs of the convolution, ``(batch, conv_size - 1, channels)``, zero before the document.
    """

    matrix: Tensor
    conv_inputs: Tensor


class GatedDeltaNet(Memory[GatedDeltaNetState]):
    """A memory that makes the layer's output by itself, in place of attention.

    Args:
        dim: Width of the hidden states.
        heads: Number of matrices, which are the value heads.
        key_heads: Number of query and key heads; each serves ``heads / key_heads`` matrices. Defaults to ``heads``.
        key_dim: Width of a key head. Defaults to dim / heads.
        value_dim: Width of a value head. Defaults to dim / heads.
        conv_size: Tokens that the convolution sees, the current one included.
        negative_eigenvalues: If True, write strengths reach 2 instead of 1, so that a write can flip the sign of what
            is stored (Grazzi et al. 2024), which tracking a state needs.
        decay: "head" for one decay per head and token, "channel" for one per key channel.
        norm_eps: Epsilon of the norm of the reads.

    Raises:
        MemtxError: A number is out of range, or heads do not divide as they must.
    """

    supports_padding = True

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        decay: Literal["head", "channel"] = "head",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim)
        if key_dim is None or value_dim is None:
            check_divisible("Choose a divisor, or give key_dim and value_dim.", dim=dim, heads=heads)
        self.heads, self.key_heads = heads, key_heads if key_heads is not None else heads
        self.key_dim = key_dim if key_dim is not None else dim // heads
        self.value_dim = value_dim if value_dim is not None else dim // heads
        check_at_least(1, key_dim=self.key_dim, value_dim=self.value_dim, conv_size=conv_size, key_heads=self.key_heads)
        check_divisible(heads=heads, key_heads=self.key_heads)
        if decay not in ("head", "channel"):
            raise MemtxError(f"decay is {decay!r}.", "Give 'head' or 'channel'.")
        self.conv_size, self.negative_eigenvalues, self.decay = conv_size, negative_eigenvalues, decay
        self.max_write, self.norm_eps = 2.0 if negative_eigenvalues else 1.0, norm_eps
        self.widths = [self.key_heads * self.key_dim, self.key_heads * self.key_dim, heads * self.value_dim]
        num_decays = heads * (self.key_dim if decay == "channel" else 1)
        self.qkv = Linear(dim, sum(self.widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.widths), 1, conv_size))
        self.write_gate = Linear(dim, heads, bias=False)
        self.decay_gate = Linear(dim, num_decays, bias=False)
        self.log_decay_rate = nn.Parameter(torch.empty(heads))
        self.decay_bias = nn.Parameter(torch.empty(num_decays))
        self.output_gate = Linear(dim, heads * self.value_dim, bias=False)
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.out = Linear(heads * self.value_dim, dim, bias=False)
        self.reset_decay()

    def reset_decay(self) -> None:
        """Initialize the convolution and the decay as published: rates of 1 to 16, steps of 0.001 to 0.1."""
        bound = self.conv_size**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        with torch.no_grad():
            self.log_decay_rate.copy_(torch.empty(self.heads).uniform_(1.0, 16.0).log())
            step = torch.empty(len(self.decay_bias)).uniform_(math.log(0.001), math.log(0.1)).exp()
            # The inverse of softplus.
            self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def init_state(self, batch_size: int, *, like: Tensor) -> GatedDeltaNetState:
        """Return empty matrices."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        matrix = like.new_zeros(batch_size, self.heads, self.key_dim, self.value_dim, dtype=dtype)
        return GatedDeltaNetState(matrix, like.new_zeros(batch_size, self.conv_size - 1, sum(self.widths)))

    def read(self, state: GatedDeltaNetState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write and read every token in order; the view's context is the layer's output."""
        return View.readout_only(segment, *self.mix(state, x, segment))

    def mix(self, state: GatedDeltaNetState, x: Tensor, segment: Segment) -> tuple[Tensor, GatedDeltaNetState]:
        """Return the layer's output for inputs x, both ``(batch, length, dim)``, and the next state."""
        outputs, matrix, conv_inputs, start = [], state.matrix, state.conv_inputs, 0
        chunks = split_without_grad(x) if segment.valid_length is None else (x,)
        for chunk in chunks:
            qkv = self.qkv(chunk)
            conv_inputs, end = conv_inputs.to(qkv.dtype), start + chunk.shape[1]
            position = segment.position[:, start:end]
            reads, matrix = gated_delta_net(
                qkv, self.output_gate(chunk), self.write_gate(chunk), self.decay_gate(chunk), conv_inputs, matrix,
                position, segment.valid_length, self._weights(), max_write=self.max_write, norm_eps=self.norm_eps,
            )  # fmt: skip
            outputs.append(self.out(reads))
            if end == segment.length:
                conv_inputs = update_cache(conv_inputs, qkv, segment)
            else:
                recent = torch.cat([conv_inputs, qkv[:, -self.conv_size :]], dim=1)
                conv_inputs = recent[:, recent.shape[1] - conv_inputs.shape[1] :]
            start = end
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return out, GatedDeltaNetState(matrix, conv_inputs)

    def step(self, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """Return the layer's output ``(batch, dim)`` for one token per stream; the state is changed in place."""
        qkv = self.qkv(x)
        window = torch.cat([state.conv_inputs, qkv[:, None].to(state.conv_inputs.dtype)], dim=1)
        state.conv_inputs.copy_(window[:, 1:])
        mixed = F.silu(torch.einsum("bsc,cs->bc", window.to(qkv.dtype), self.conv_weight[:, 0]))
        dtype, matrix, weights = state.matrix.dtype, state.matrix, self._weights()
        q, k, v = (part[:, :, 0] for part in split_qkv(mixed[:, None], matrix))
        beta, log_decay = compute_gates(
            self.write_gate(x)[:, None], self.decay_gate(x)[:, None], weights, self.key_dim, self.max_write
        )
        ratio = self.heads // self.key_heads
        q, k = (normalize_address(part, dtype).repeat_interleave(ratio, dim=1) for part in (q, k))
        # (batch, heads, 1 or key_dim, 1)
        matrix.mul_(log_decay.to(dtype).exp().view(*matrix.shape[:2], -1, 1))
        update = beta.to(dtype) * (v.to(dtype) - torch.einsum("bhkv,bhk->bhv", matrix, k))
        matrix.addcmul_(k[..., None], update[:, :, None])
        reads = torch.einsum("bhkv,bhk->bhv", matrix, q) * self.key_dim**-0.5
        return self.out(gate_reads(reads, self.output_gate(x), self.norm.weight, self.norm_eps))

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of inputs x before the convolution, ``(batch, length, heads * value_dim)``."""
        return self.qkv(x)[..., -self.widths[2] :]

    def _weights(self) -> DeltaNetWeights:
        return DeltaNetWeights(self.conv_weight, self.decay_bias, self.log_decay_rate, self.norm.weight)
