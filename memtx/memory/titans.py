"""Titans (Behrouz et al. 2025): a memory whose content are the weights of a small network, learned token by token.

:mod:`memtx.ops.neural_memory` has the equations. The memory stands beside attention as a gate (MAG, section 4.2) or as
context (MAC, section 4.1); :class:`PersistentMemory` adds the paper's persistent tokens (section 3.3) to either. As
published, gradients are taken at the weights of the chunk's start, here an interval of the document, so results do not
depend on segmentation. The paper's short convolution of queries, keys and values is a token shift here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_at_least, check_divisible, check_positive
from memtx.memory.base import ContentAttention, Memory, Readout, View
from memtx.memory.intervals import IntervalRuns
from memtx.memory.none import NoState
from memtx.memory.parts import Gate, TokenShift, merge_heads, split_heads
from memtx.memory.recurrent import locate_entries, update_cache
from memtx.ops.attention.mask import is_inside
from memtx.ops.attention.reference import softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.ops.neural_memory import Gates, Weights, apply_network, learn_chunk
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class TitansState:
    """The network of each head after the last token, zero before a document's first.

    Attributes:
        start: Weights at the start of the open interval, each ``(batch, heads, in, out)``, float32 or wider.
        weights: Weights after the last token.
        momentum: Momentum after the last token.
        last_input: Last input, for the token shift, ``(batch, dim)``.
        retrieved: Reads of the open interval's tokens, for the context, ``(batch, interval - 1, dim)``, newest last;
            ``(batch, 0, dim)`` for the gate.
    """

    start: Weights
    weights: Weights
    momentum: Weights
    last_input: Tensor
    retrieved: Tensor


@dataclass(frozen=True)
class _Context:
    state: TitansState
    retrieved: Tensor
    attention: ContentAttention
    mask: Tensor


class TitansMemory(Memory[TitansState]):
    """A neural memory that gates attention's output per channel (MAG, section 4.2).

    The gate is a sigmoid of the normalized read, whose weights are learned.

    Args:
        dim: Width of the hidden states.
        heads: Number of networks; each has ``dim / heads`` inputs and outputs.
        depth: Layers of a network; 1 is a matrix.
        expansion: Width of its hidden layers in multiples of the input's.
        interval: Tokens of a document whose gradients are taken at the same weights (the paper's chunk size).
        max_step: Largest step theta; steps, momentum and forgetting depend on the token.
        max_gradient_norm: Largest norm of a token's gradient. Long intervals of similar keys overshoot otherwise, as
            all their gradients are taken at the same weights.
        token_shift: If True, keys, values and queries mix each token with the previous one.

    Raises:
        MemtxError: A number is out of range, or dim is not divisible by heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        depth: int = 2,
        expansion: int = 2,
        interval: int = 16,
        max_step: float = 1.0,
        max_gradient_norm: float = 1.0,
        token_shift: bool = True,
    ) -> None:
        super().__init__(dim)
        check_divisible("Choose a divisor for TitansMemory's heads.", dim=dim, heads=heads)
        check_at_least(1, depth=depth, expansion=expansion, interval=interval)
        check_positive(max_step=max_step, max_gradient_norm=max_gradient_norm)
        self.heads, self.depth, self.expansion = heads, depth, expansion
        self.interval: int = interval
        self.max_step, self.max_gradient_norm = max_step, max_gradient_norm
        width = dim // heads
        widths = [width, *[expansion * width] * (depth - 1), width]
        self.network = nn.ParameterList(
            torch.randn(heads, *sizes) / math.sqrt(sizes[0]) for sizes in itertools.pairwise(widths)
        )
        self.query, self.key, self.value = (Linear(dim, dim, bias=False) for _ in range(3))
        # Steps can reach 0, so that a token may write nothing. Forgetting, small at first, is a plain sigmoid, which
        # always has a gradient.
        self.step_gate = Gate(dim, heads)
        self.forget_gate = Gate(dim, heads, bias_init=-5.0, stretch=0.0)
        self.momentum_gate = Linear(dim, heads)
        self.read_norm = nn.RMSNorm(dim)
        self.token_shift = TokenShift(dim) if token_shift else None

    @property
    def context_length(self) -> int:
        """Reads carried as context."""
        return 0

    def init_state(self, batch_size: int, *, like: Tensor) -> TitansState:
        """Return networks without content."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        start, weights, momentum = (
            tuple(like.new_zeros(batch_size, *matrix.shape, dtype=dtype) for matrix in self.network) for _ in range(3)
        )
        last_input = like.new_zeros(batch_size, self.dim)
        retrieved = like.new_zeros(batch_size, self.context_length, self.dim)
        return TitansState(start, weights, momentum, last_input, retrieved)

    def read(self, state: TitansState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Learn and read every token in order."""
        reads, next_state = self._learn(state, x, segment)
        return View.readout_only(segment, reads, next_state)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return zeros, which take the share of the attention output that the gate closes."""
        closed = split_heads(1.0 - self._gate(view.context), q.shape[2]).to(q.dtype)
        return Readout(torch.zeros_like(closed), gate=closed)

    def _gate(self, reads: Tensor) -> Tensor:
        return torch.sigmoid(self.read_norm(reads))

    def _begin_run(self, runs: IntervalRuns, index: int, *networks: Weights) -> tuple[Weights, Weights, Weights]:
        """Return start, weights and momentum at a run's first token."""
        begins = runs.starts_document[:, index, None, None, None]
        begins_interval = runs.starts_interval[:, index, None, None, None]
        start, weights, momentum = networks
        weights = tuple(
            torch.where(begins, initial.to(matrix.dtype), matrix)
            for initial, matrix in zip(self.network, weights, strict=True)
        )
        start = tuple(torch.where(begins_interval, *pair) for pair in zip(weights, start, strict=True))
        return start, weights, tuple(matrix.masked_fill(begins, 0.0) for matrix in momentum)

    def _project(self, x: Tensor) -> Tensor:
        """Return queries, keys, values and the inputs of the gates, ``(batch, length, 3 * dim + 3 * heads)``."""
        addresses = [F.silu(projection(x)) for projection in (self.query, self.key, self.value)]
        gates = [gate(x) for gate in (self.step_gate, self.momentum_gate, self.forget_gate)]
        return torch.cat([*addresses, *gates], dim=-1).to(torch.promote_types(x.dtype, torch.float32))

    def _split_projection(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """Return queries and keys of unit length (section 4.4), values and gates by head."""
        addresses, gates = projected[..., : 3 * self.dim], projected[..., 3 * self.dim :]
        q, k, v = (split_heads(part, self.heads) for part in addresses.chunk(3, dim=-1))
        step, momentum, alpha = gates.mT.chunk(3, dim=1)
        # Forgetting everything has no finite logarithm.
        log_keep = torch.log1p(-alpha.clamp(max=1.0 - 1e-6))
        return (
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            Gates(self.max_step * step, F.logsigmoid(momentum), log_keep),
        )

    def _learn(self, state: TitansState, x: Tensor, segment: Segment) -> tuple[Tensor, TitansState]:
        """Return the reads of inputs x, both ``(batch, length, dim)``, and the next state."""
        runs = IntervalRuns.from_segment(segment, self.interval)
        shifted = self.token_shift(x, state.last_input, segment) if self.token_shift is not None else x
        networks, reads = (state.start, state.weights, state.momentum), []
        projected = self._project(shifted)
        with torch.autocast(x.device.type, enabled=False):
            for index, part in enumerate(runs.split(projected)):
                q, k, v, gates = self._split_projection(part)
                start, weights, momentum = self._begin_run(runs, index, *networks)
                mask = runs.token_mask[:, index]
                out, weights, momentum = learn_chunk(
                    weights, momentum, start, q, k, v, gates, mask, self.max_gradient_norm
                )
                networks = start, weights, momentum
                reads.append(merge_heads(out))
        start, weights, momentum = networks
        next_state = TitansState(start, weights, momentum, TokenShift.last_input(x), state.retrieved)
        return runs.join(reads).to(x.dtype), next_state


class TitansContextMemory(TitansMemory):
    """A neural memory that attention reads as context, and that learns from attention's outputs (MAC, section 4.1).

    What the network of the interval's start returns for a token is visible to this and the interval's later tokens,
    beside the tokens themselves (equation 21). Attention's outputs are learned and gated by what the network then
    returns for them (equations 23 to 25). A call is read up to the next end of an interval in any stream at a time.
    """

    uses_layer_projections = True

    @property
    def context_length(self) -> int:
        """Reads carried as context."""
        return self.interval - 1

    @property
    def needs_layer_output(self) -> bool:
        """True, since an interval reads what the one before has learned from attention's outputs."""
        return True

    def read(self, state: TitansState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Read the network of the interval's start."""
        runs, reads = IntervalRuns.from_segment(segment, self.interval), []
        queries = F.silu(self.query(x)).to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            for index, part in enumerate(runs.split(queries)):
                start, _, _ = self._begin_run(runs, index, state.start, state.weights, state.momentum)
                q = F.normalize(split_heads(part, self.heads), dim=-1)
                reads.append(merge_heads(apply_network(start, q)))
        retrieved = runs.join(reads).to(x.dtype)
        return View.readout_only(segment, _Context(state, retrieved, attention, self._mask(segment)))

    def _mask(self, segment: Segment) -> Tensor:
        """Return which of [carried reads | the call's reads] a token sees, ``(batch, 1, length, reads)`` bool."""

        def build() -> Tensor:
            offset, position, until = locate_entries(segment, self.context_length)
            until = torch.minimum(offset + self.interval - position % self.interval, until)
            until = until.masked_fill(position < 0, -INFINITE_OFFSET)
            query = offset[:, None, self.context_length :, None]
            return is_inside(query, offset[:, None, None], until[:, None, None])

        return segment.memo((TitansContextMemory, self.interval), build)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the reads with the layer's projections, in one softmax with its attention."""
        context: _Context = view.context
        entries = torch.cat([context.state.retrieved.to(q.dtype), context.retrieved], dim=1)
        k, v = (context.attention.project(entries, name, frozen=False).transpose(1, 2) for name in ("key", "value"))
        out, lse = softmax_attention((q.transpose(1, 2) @ k.mT) * q.shape[-1] ** -0.5, context.mask, v)
        return Readout(out, lse=lse)

    def transform_output(self, view: View, outputs: Tensor, segment: Segment) -> tuple[Tensor, View]:
        """Learn attention's outputs and gate them."""
        context: _Context = view.context
        reads, state = self._learn(context.state, outputs, segment)
        retrieved = update_cache(state.retrieved.to(outputs.dtype), context.retrieved.to(outputs.dtype), segment)
        return outputs * self._gate(reads), replace(view, next_state=replace(state, retrieved=retrieved))


class PersistentMemory(Memory[NoState]):
    """Learned tokens that every query sees, with the layer's own projections and without positions (section 3.3).

    Args:
        dim: Width of the hidden states.
        num_tokens: Number of tokens.

    Raises:
        MemtxError: num_tokens is not positive.
    """

    uses_layer_projections = True
    supports_padding = True
    unbounded = False

    def __init__(self, dim: int, num_tokens: int = 16) -> None:
        super().__init__(dim)
        check_at_least(1, num_tokens=num_tokens)
        self.num_tokens = num_tokens
        self.tokens = nn.Parameter(torch.randn(num_tokens, dim))

    def init_state(self, batch_size: int, *, like: Tensor) -> NoState:
        """Return the empty state."""
        return NoState()

    def read(self, state: NoState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Project the tokens."""
        tokens = self.tokens[None].to(x.dtype)
        keys_values = tuple(attention.project(tokens, name, frozen=False).transpose(1, 2) for name in ("key", "value"))
        return View.readout_only(segment, keys_values, state)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the tokens, in one softmax with the layer's attention."""
        k, v = view.context
        scores = (q.transpose(1, 2) @ k.mT) * q.shape[-1] ** -0.5
        out, lse = softmax_attention(scores, torch.ones_like(scores, dtype=torch.bool), v)
        return Readout(out, lse=lse)
