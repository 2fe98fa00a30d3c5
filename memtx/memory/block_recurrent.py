"""The recurrent layer of the Block-Recurrent Transformer (Hutchins et al. 2022, section 3).

State vectors are updated once per block of tokens, here an interval of the document, so results do not depend on
segmentation. In the vertical direction tokens attend to the vectors beside their window; in the horizontal one vectors
attend to themselves and to the block's tokens, and a gate takes the place of the residual connection (section 3.2).
This is the paper's "skip" configuration, its best: no feed-forward part for the vectors. The paper has one such layer
in the upper half of the stack.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, Memory, Readout, View, project_by_layer
from memtx.memory.intervals import IntervalRuns
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.attention.reference import merge_attention, softmax_attention
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment
from memtx.state import state_dataclass

StateGate = Literal["fixed", "lstm"]
"""A learned share of the old content for each channel, or an input and a forget gate from the attention's outputs."""


@state_dataclass
class BlockRecurrentState:
    """The vectors and their attention to the open interval.

    Attributes:
        vectors: Vectors of the open interval, ``(batch, num_vectors, dim)``.
        partial_output: Output of their attention to its tokens so far, ``(batch, num_vectors, dim)``.
        partial_lse: Log-sum-exp of that attention, ``(batch, num_vectors, heads)``.
    """

    vectors: Tensor
    partial_output: Tensor
    partial_lse: Tensor


class BlockRecurrentMemory(Memory[BlockRecurrentState]):
    """Recurrent state vectors next to an exact memory.

    Tokens' keys and values are the layer's own without positions, in both directions; queries are separate (section
    3.1). The readout's projection adds to the layer's own, which equals one projection of both outputs side by side.

    Args:
        dim: Width of the hidden states.
        num_vectors: Number of state vectors.
        interval: Tokens of a document between two updates (the paper's block, 512).
        heads: Heads of the layer.
        gate: "fixed" (the paper's best) or "lstm".

    Raises:
        MemtxError: A number is not positive, or the gate is unknown.
    """

    def __init__(
        self, dim: int, num_vectors: int = 64, interval: int = 128, heads: int = 4, gate: StateGate = "fixed"
    ) -> None:
        super().__init__(dim)
        check_at_least(1, num_vectors=num_vectors, interval=interval, heads=heads)
        if gate not in get_args(StateGate):
            raise MemtxError(f"gate is {gate!r}.", "Give 'fixed' or 'lstm'.")
        self.interval: int = interval
        self.num_vectors, self.heads, self.gate = num_vectors, heads, gate
        self.scale = (dim // heads) ** -0.5
        self.initial = nn.Parameter(0.1 * torch.randn(num_vectors, dim))
        # Vectors are told apart by learned positions (section 3.3).
        self.vector_positions = nn.Parameter(torch.randn(num_vectors, dim))
        self.norm = nn.LayerNorm(dim)
        self.token_query, self.self_query, self.cross_query, self.vector_key, self.vector_value, self.out = (
            Linear(dim, dim, bias=False) for _ in range(6)
        )
        self.update = Linear(2 * dim, dim)
        self.fixed_gate = nn.Parameter(0.1 * torch.randn(dim)) if gate == "fixed" else None
        self.input_forget_gates = Linear(2 * dim, 2 * dim) if gate == "lstm" else None

    def init_state(self, batch_size: int, *, like: Tensor) -> BlockRecurrentState:
        """Return zeros: no vectors and an empty interval."""
        vectors = like.new_zeros(batch_size, self.num_vectors, self.dim)
        dtype = torch.promote_types(like.dtype, torch.float32)
        lse = vectors.new_zeros(batch_size, self.num_vectors, self.heads, dtype=dtype)
        return BlockRecurrentState(vectors, vectors.to(dtype), lse)

    def read(self, state: BlockRecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Read and update the vectors run by run."""
        runs = IntervalRuns.from_segment(segment, self.interval)
        keys, values = project_by_layer(self, self.heads, x, attention, "key", "value")
        tokens = torch.cat([self.token_query(x), keys, values], dim=-1)
        vectors = state.vectors.to(x.dtype)
        partial_output, lse = split_heads(state.partial_output.to(x.dtype), self.heads), state.partial_lse.mT
        reads = []
        for index, part in enumerate(runs.split(tokens)):
            q, k, v = (split_heads(projected, self.heads) for projected in part.chunk(3, dim=-1))
            starts_document = runs.starts_document[:, index, None, None]
            starts_interval = runs.starts_interval[:, index, None, None]
            vectors = torch.where(starts_interval, self._update(vectors, partial_output), vectors)
            vectors = torch.where(starts_document, self.initial.to(x.dtype), vectors)
            normalized = self.norm(vectors) + self.vector_positions.to(x.dtype)
            vector_keys, vector_values, queries = (
                split_heads(projection(normalized), self.heads)
                for projection in (self.vector_key, self.vector_value, self.cross_query)
            )
            reads.append(merge_heads(F.scaled_dot_product_attention(q, vector_keys, vector_values, scale=self.scale)))
            mask = runs.token_mask[:, index, None, None]
            attended = softmax_attention((queries @ k.mT) * self.scale, mask, v)
            past = partial_output, lse.masked_fill(starts_interval, -torch.inf).to(attended[1].dtype)
            partial_output, lse = merge_attention([attended, past])
        dtype = state.partial_output.dtype
        next_state = BlockRecurrentState(vectors, merge_heads(partial_output).to(dtype), lse.mT.to(dtype))
        return View.readout_only(segment, self.out(runs.join(reads)), next_state)

    def _update(self, vectors: Tensor, attended: Tensor) -> Tensor:
        """Return the vectors after an interval, given their attention to it ``(batch, heads, vectors, head_dim)``."""
        normalized = self.norm(vectors) + self.vector_positions.to(vectors.dtype)
        q, k, v = (
            split_heads(projection(normalized), self.heads)
            for projection in (self.self_query, self.vector_key, self.vector_value)
        )
        to_themselves = merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        hidden = torch.cat([to_themselves, merge_heads(attended).to(vectors.dtype)], dim=-1)
        new = self.update(hidden)
        if self.fixed_gate is not None:
            return torch.lerp(new, vectors, torch.sigmoid(self.fixed_gate).to(new.dtype)).to(vectors.dtype)
        assert self.input_forget_gates is not None
        write, keep = self.input_forget_gates(hidden).chunk(2, dim=-1)
        return (vectors * torch.sigmoid(keep + 1.0) + torch.tanh(new) * torch.sigmoid(write - 1.0)).to(vectors.dtype)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return what the tokens read from the vectors, split into the layer's heads."""
        return Readout(split_heads(view.context, q.shape[2]))
