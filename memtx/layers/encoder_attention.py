"""Bidirectional attention over whole texts: its masks, the base class of all encoder attentions, and full attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memtx.errors import check_divisible
from memtx.memo import Memo
from memtx.memory.parts import merge_heads, split_heads
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear


@dataclass(frozen=True)
class EncoderInputs(Memo):
    """The masks of a batch of whole texts.

    Attributes:
        length: Length of the batch.
        device: Device of the tensors.
        attention_mask: True for tokens, False for padding, ``(batch, length)`` bool. None if there is no padding.
        global_indices: Positions of global tokens, which see all tokens and are seen by all, ``(batch, n)`` int64; -1
            fills up texts with fewer. None if there are none.
        random_blocks: Random blocks by layer index, (1 or heads, query blocks, r) int64, used instead of sampled ones.
    """

    length: int
    device: torch.device
    attention_mask: Tensor | None = None
    global_indices: Tensor | None = None
    random_blocks: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def present(self) -> Tensor:
        """The attention mask, or its form without padding, ``(1, length)`` bool."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(1, self.length, dtype=torch.bool, device=self.device)

    def zero_padding(self, x: Tensor) -> Tensor:
        """Return x ``(batch, length, dim)`` with zeros at padding."""
        return x if self.attention_mask is None else x.masked_fill(~self.attention_mask[..., None], 0.0)

    @classmethod
    def from_masks(
        cls,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        random_blocks: Mapping[int, Tensor] | None = None,
    ) -> EncoderInputs:
        """Create the inputs from masks in the conventions of the ``transformers`` library.

        Args:
            tokens: Token ids, ``(batch, length)``.
            attention_mask: 0 for padding, 1 for a token, 2 for a global token, ``(batch, length)``.
            global_attention_mask: 1 for a global token, ``(batch, length)``; padding is never global.
            random_blocks: As in the class.
        """
        present = is_global = global_indices = None
        if attention_mask is not None:
            is_global = attention_mask > 1
            present = None if bool((attention_mask > 0).all()) else attention_mask > 0
        if global_attention_mask is not None:
            marked = global_attention_mask > 0
            is_global = marked if is_global is None else is_global | marked
        if is_global is not None:
            is_global = is_global if present is None else is_global & present
            if most := int(is_global.sum(1).max()):
                # A stable sort puts the positions of global tokens first, in order.
                first = torch.argsort(~is_global, dim=1, stable=True)[:, :most]
                global_indices = torch.where(is_global.gather(1, first), first, -1)
        return cls(tokens.shape[1], tokens.device, present, global_indices, random_blocks or {})


class EncoderAttention(nn.Module, ABC):
    """Self-attention over the tokens of a text (Vaswani et al. 2017, section 3.2.2).

    Args:
        dim: Width of the hidden states.
        heads: Number of heads.
        layer_index: Index of the layer, from 0.
        bias: If True, the query, key and value projections have biases.
        out_bias: If True, the output projection has a bias.
        dropout: Dropout rate of the attention weights.
        backend: Attention backend.

    Raises:
        MemtxError: dim is not divisible by heads.
    """

    supports_global_attention = False
    """If True, tokens can be marked as global."""

    supports_random_blocks = False
    """If True, random blocks can be given."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layer_index: int = 0,
        *,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        check_divisible(dim=dim, heads=heads)
        self.heads = heads
        self.layer_index = layer_index
        self.dropout = dropout
        self.backend: AttentionBackend = backend
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, dim, bias=bias)
        self.value = Linear(dim, dim, bias=bias)
        self.out = Linear(dim, dim, bias=out_bias)

    def forward(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Attend from each token of ``(batch, length, dim)`` to the tokens of its text; returns the same shape."""
        return self.out(self.attend(x, inputs))

    @abstractmethod
    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated, in the same shape."""

    def attention_scores(self, x: Tensor, queries: slice, keys: slice) -> Tensor:
        """Return the scaled scores between slices of x, ``(batch, heads, queries, keys)``, without any mask."""
        q, k = split_heads(self.query(x[:, queries]), self.heads), split_heads(self.key(x[:, keys]), self.heads)
        out: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return out

    def within_window(self, distance: Tensor) -> Tensor | None:
        """Return True where tokens at a distance, key minus query, int64 of any shape, see each other.

        Global tokens are left aside. None if visibility is not a function of distance.
        """
        return None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of x, each ``(batch, heads, length, head_dim)``."""
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.query, self.key, self.value))
        return q, k, v

    def attend_visible(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        """Attend to the visible keys; q, k, v and the result are ``(batch, heads, n, head_dim)``."""
        dropout = self.dropout if self.training else 0.0
        return segment_attention(q, k, v, visibility, dropout=dropout, backend=self.backend)[0]


class FullAttention(EncoderAttention):
    """Attention in which every token sees every other (BERT, Devlin et al. 2019)."""

    def within_window(self, distance: Tensor) -> Tensor:
        """Return True everywhere."""
        return torch.ones_like(distance, dtype=torch.bool)

    def attend(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the attention outputs of x ``(batch, length, dim)``, all heads concatenated, in the same shape."""
        return merge_heads(self.attend_visible(*self.project(x), full_visibility(inputs, inputs.length)))


def full_visibility(inputs: EncoderInputs, num_queries: int) -> Visibility:
    """Return the visibility of ``num_queries`` queries that see every token of the text."""

    def compute() -> Visibility:
        visible_from = torch.zeros(1, inputs.length, dtype=torch.int64, device=inputs.device)
        visible_until = visible_from + num_queries
        if inputs.attention_mask is not None:
            visible_until = torch.where(inputs.attention_mask, visible_until, 0)
            visible_from = visible_from.expand_as(visible_until)
        return Visibility(visible_from, visible_until, num_queries, (KeyRange(inputs.length),))

    return inputs.memo(("full", num_queries), compute)
