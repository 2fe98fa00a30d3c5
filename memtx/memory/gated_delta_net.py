"""Gated DeltaNet (Yang et al. 2024, section 3.3), as in Qwen 3.5: a layer whose memory is one matrix per head.

It takes the place of attention. Queries, keys and values pass a short causal convolution; the matrix is written and
read at every token by the gated delta rule (:mod:`memtx.ops.delta_rule`), and the normalized reads are gated. With a
decay per key channel it is Kimi Delta Attention (Kimi Linear, Kimi Team 2025, section 3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least, check_divisible
from memtx.memory.base import ContentAttention, Memory, View
from memtx.memory.parts import merge_heads, split_heads
from memtx.memory.recurrent import update_cache
from memtx.ops.cpu.linear import Linear
from memtx.ops.delta_rule import gated_delta_rule
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
        qkv = self.qkv(x)
        q, k, v = torch.split(self._convolve(state.conv_inputs.to(qkv.dtype), qkv, segment), self.widths, dim=-1)
        beta, log_decay = self._gates(x)
        document_starts = segment.position == 0
        if segment.valid_length is not None:
            # Padding neither writes, decays nor starts a document.
            index = torch.arange(segment.length, device=x.device)
            is_padding = segment.memo("padding", lambda: index >= segment.valid_length[:, None])[:, None]  # type: ignore[index]
            beta = beta.masked_fill(is_padding, 0.0)
            document_starts = document_starts & ~is_padding[:, 0]
            log_decay = log_decay.masked_fill(is_padding if log_decay.dim() == 3 else is_padding[..., None], 0.0)
        dtype = beta.dtype
        q, k, v = self._address(q, dtype) * self.key_dim**-0.5, self._address(k, dtype), split_heads(v, self.heads)
        out, matrix = gated_delta_rule(q, k, v.to(dtype), beta, log_decay, state.matrix.to(dtype), document_starts)
        return self._output(merge_heads(out), x), GatedDeltaNetState(
            matrix, update_cache(state.conv_inputs.to(qkv.dtype), qkv, segment)
        )

    def step(self, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """Return the layer's output ``(batch, dim)`` for one token per stream; the state is changed in place."""
        qkv = self.qkv(x)
        window = torch.cat([state.conv_inputs, qkv[:, None].to(state.conv_inputs.dtype)], dim=1)
        state.conv_inputs.copy_(window[:, 1:])
        mixed = F.silu(torch.einsum("bsc,cs->bc", window.to(qkv.dtype), self.conv_weight[:, 0]))
        q, k, v = torch.split(mixed[:, None], self.widths, dim=-1)
        beta, log_decay = self._gates(x[:, None])
        dtype, matrix = state.matrix.dtype, state.matrix
        ratio = self.heads // self.key_heads
        q, k = (self._address(part, dtype)[:, :, 0].repeat_interleave(ratio, dim=1) for part in (q, k))
        v = v.reshape(-1, self.heads, self.value_dim).to(dtype)
        # (batch, heads, 1 or key_dim, 1)
        matrix.mul_(log_decay.to(dtype).exp().view(*matrix.shape[:2], -1, 1))
        update = beta.to(dtype) * (v - torch.einsum("bhkv,bhk->bhv", matrix, k))
        matrix.addcmul_(k[..., None], update[:, :, None])
        out = torch.einsum("bhkv,bhk->bhv", matrix, q) * self.key_dim**-0.5
        return self._output(out.flatten(1), x)

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of inputs x before the convolution, ``(batch, length, heads * value_dim)``."""
        return self.qkv(x)[..., -self.widths[2] :]

    def _convolve(self, past: Tensor, inputs: Tensor, segment: Segment) -> Tensor:
        """Return ``SiLU`` of the causal convolution within each document; inputs: ``(batch, length, channels)``."""
        padded = torch.cat([past, inputs], dim=1)
        out = inputs * self.conv_weight[:, 0, -1]
        for lag in range(1, self.conv_size):
            start = self.conv_size - 1 - lag
            earlier = padded[:, start : start + segment.length]
            if segment.has_document_starts:
                earlier = earlier.masked_fill((segment.position < lag)[..., None], 0.0)
            out = torch.addcmul(out, earlier, self.conv_weight[:, 0, start])
        return F.silu(out)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the write strengths and log decays, ``(batch, heads, length)``, decays by channel with key_dim behind.

        Both are in float32 or wider.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.write_gate(x).to(dtype)).mT
        step = F.softplus(self.decay_gate(x).to(dtype) + self.decay_bias)
        rate = -self.log_decay_rate.to(dtype).exp()
        by_channel = self.decay == "channel"
        log_decay = split_heads(step, self.heads) * rate[:, None, None] if by_channel else (step * rate).mT
        return beta * 2.0 if self.negative_eigenvalues else beta, log_decay

    def _address(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return normalized queries or keys, ``(batch, key_heads, length, key_dim)``."""
        x = split_heads(x, self.key_heads).to(dtype)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _output(self, reads: Tensor, x: Tensor) -> Tensor:
        """Normalize and gate reads, ``(..., heads * value_dim)``, and project them to dim."""
        reads = self.norm(reads.view(*reads.shape[:-1], self.heads, self.value_dim).to(self.norm.weight.dtype)).flatten(
            -2
        )
        return self.out(reads.to(x.dtype) * F.silu(self.output_gate(x)))
