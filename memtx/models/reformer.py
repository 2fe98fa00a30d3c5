"""Reformer: a decoder, or an encoder, for long texts whose memory in training does not grow with depth.

Kitaev, Kaiser and Levskaya 2020. Attention within chunks of the text and of what hashes alike, reversible layers,
feed-forward in chunks, axial positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtx.errors import MemtxError, check_at_least
from memtx.hf.layout import HFCompatibleModel
from memtx.layers import reversible
from memtx.layers.positions.absolute import AxialPositionEmbeddings, PositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention, ReformerAttention
from memtx.ops.cpu.linear import Linear


@dataclass(frozen=True)
class ReformerOutput:
    """What one call gives.

    Attributes:
        last_hidden_state: (rows, length, 2 dim), both streams side by side, normed.
        hidden_states: where asked for, the embedding's output and every layer's second stream, each
            (rows, length, dim).
        logits: (rows, length, vocab), by a model with a head.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class ReformerBlock(nn.Module):
    """One reversible layer.

    Args:
        attention: the attention part.
        dim: width of the hidden states.
        hidden_dim: inner width of the feed-forward part.
        activation: makes its non-linearity.
        feed_forward_chunk_size: places that the feed-forward part takes at once; 0 for all.
        eps: of the norms.
        dropout: of what each part adds, and within the feed-forward part.
    """

    def __init__(
        self,
        attention: ReformerAttention,
        dim: int,
        hidden_dim: int,
        activation: Callable[[], nn.Module],
        feed_forward_chunk_size: int,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.up = Linear(dim, hidden_dim)
        self.activation = activation()
        self.down = Linear(hidden_dim, dim)
        self.feed_forward_chunk_size = feed_forward_chunk_size
        self.dropout = nn.Dropout(dropout)

    def has_dropout(self) -> bool:
        """Return whether anything is dropped at random now."""
        return self.training and (self.dropout.p > 0 or self.attention.dropout_rate > 0)

    def attend(
        self, x: Tensor, attention_mask: Tensor | None, cached_buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention adds, (rows, n, dim), and the buckets that places fell into."""
        attended, buckets = self.attention(self.attention_norm(x), attention_mask, cached_buckets)
        return self.dropout(attended), buckets

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return what the feed-forward part adds, (rows, n, dim)."""
        if self.feed_forward_chunk_size == 0 or x.shape[1] <= self.feed_forward_chunk_size:
            return self._feed_forward_chunk(x)
        parts = torch.split(x, self.feed_forward_chunk_size, dim=1)  # type: ignore[no-untyped-call]
        if not torch.is_grad_enabled():
            return torch.cat([self._feed_forward_chunk(part) for part in parts], dim=1)
        # Else the inner states of all chunks would be kept, and nothing gained.
        return torch.cat([checkpoint(self._feed_forward_chunk, part, use_reentrant=False) for part in parts], dim=1)

    def _feed_forward_chunk(self, x: Tensor) -> Tensor:
        inner = self.activation(self.dropout(self.up(self.feed_forward_norm(x))))
        out: Tensor = self.dropout(self.down(inner))
        return out


class Reformer(HFCompatibleModel):
    """A model of reversible layers.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width of the hidden states.
        heads: how many a layer.
        attentions: one entry a layer; each makes the attention part from dim, heads and causal.
        hidden_dim: inner width of the feed-forward parts; 4 dim by default.
        positions: makes the positions from dim.
        causal: whether places behind a query are unseen: a decoder.
        pad_token_id: the token that fills up a text to whole chunks.
        activation: makes the non-linearity of the feed-forward parts.
        feed_forward_chunk_size: places that a feed-forward part takes at once; 0 for all.
        add_lm_head: whether there is a map to the vocabulary.
        eps: of the norms.
        dropout: of embeddings and of what each part adds.

    Raises:
        MemtxError: a number is out of range or numbers do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        heads: int = 4,
        attentions: Sequence[Callable[[int, int, bool], ReformerAttention]] = (LocalAttention, LSHAttention) * 3,
        hidden_dim: int | None = None,
        positions: Callable[[int], AxialPositionEmbeddings | PositionEmbeddings] | None = None,
        causal: bool = True,
        pad_token_id: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
        feed_forward_chunk_size: int = 0,
        add_lm_head: bool = True,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, layers=len(attentions))
        if feed_forward_chunk_size < 0:
            raise MemtxError(
                f"feed_forward_chunk_size is {feed_forward_chunk_size}.", "Give a number of places, or 0 for all."
            )
        self.save_init_args(arguments)
        self.vocab_size = vocab_size
        self.dim = dim
        self.pad_token_id = pad_token_id
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = PositionEmbeddings(dim, 4096) if positions is None else positions(dim)
        self.blocks = nn.ModuleList(
            ReformerBlock(
                attention(dim, heads, causal),
                dim,
                hidden_dim if hidden_dim is not None else 4 * dim,
                activation,
                feed_forward_chunk_size,
                eps,
                dropout,
            )
            for attention in attentions
        )
        self.norm = nn.LayerNorm(2 * dim, eps=eps)
        self.head = Linear(2 * dim, vocab_size) if add_lm_head else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights anew: normal, biases zero, norms one; axial positions of variance one, as published."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
            if isinstance(part, AxialPositionEmbeddings):
                for weight in part.weights:
                    nn.init.normal_(weight)

    def _layers(self) -> list[ReformerBlock]:
        return cast(list[ReformerBlock], list(self.blocks))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> ReformerOutput:
        """Read whole texts; arguments bear the names of the ``transformers`` library.

        Args:
            input_ids: (rows, length) int64; filled up to whole chunks within.
            attention_mask: (rows, length), 0 for padding and 1 for a token; None for no padding.
            output_hidden_states: whether to return hidden states; the backward pass then keeps all of them.

        Raises:
            MemtxError: shapes do not fit each other, or a text is too long.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise MemtxError(
                f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}, expected int64 (rows, length), "
                "length at least 1.",
                "Reshape it; one text alone is input_ids[None].",
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise MemtxError(
                f"attention_mask is {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)}.",
                "Match input_ids.",
            )
        length = input_ids.shape[1]
        tokens, present = self._pad_to_chunks(input_ids, attention_mask)
        if tokens.shape[1] > self.positions.max_length:
            raise MemtxError(
                f"A text of {length} tokens needs {tokens.shape[1]} positions, "
                f"the model has {self.positions.max_length}.",
                "Cut the text, or use a model with more positions.",
            )
        x = self.dropout(self.embedding(tokens)) + self.dropout(self.positions(tokens.shape[1]))
        x1, x2, hidden = x, x, [x]
        if output_hidden_states or not torch.is_grad_enabled():
            for block in self._layers():
                x1 = x1 + block.attend(x2, present, None)[0]
                x2 = x2 + block.feed_forward(x1)
                if output_hidden_states:
                    hidden.append(x2)
        else:
            x1, x2 = reversible.reversible_forward(x1, x2, self._layers(), present)
        x = self.dropout(self.norm(torch.cat([x1, x2], dim=-1)))[:, :length]
        return ReformerOutput(
            x,
            tuple(state[:, :length] for state in hidden) if output_hidden_states else None,
            self.head(x) if self.head is not None else None,
        )

    def _pad_to_chunks(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return tokens and their presence, filled up so that every layer's chunks are whole."""
        chunks = {block.attention.chunk_length for block in self._layers()}
        common, length = math.lcm(*chunks), tokens.shape[1]
        present = None
        if attention_mask is not None and not bool((attention_mask > 0).all()):
            present = attention_mask > 0
        if length % common == 0 or length <= min(chunks):
            return tokens, present
        more = -length % common
        if present is None:
            present = torch.ones_like(tokens, dtype=torch.bool)
        return F.pad(tokens, (0, more), value=self.pad_token_id), F.pad(present, (0, more))
