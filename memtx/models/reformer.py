"""Reformer (Kitaev, Kaiser and Levskaya 2020): training memory does not grow with depth.

Layers attend within chunks of the text or of positions with equal hashes, and are reversible, with chunked feed-forward
parts and axial positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers import reversible
from memtx.layers.positions.absolute import AxialPositionEmbeddings, PositionEmbeddings
from memtx.layers.reformer import LocalAttention, LSHAttention, ReformerAttention
from memtx.models.encoder import EncoderOutput, init_normal
from memtx.models.validation import check_token_ids
from memtx.ops.cpu.linear import Linear


class ReformerBlock(nn.Module):
    """One reversible layer; arguments as in :class:`Reformer`. Dropout also applies within the feed-forward part."""

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
        """Return whether dropout is active."""
        return self.training and (self.dropout.p > 0 or self.attention.dropout > 0)

    def attend(
        self, x: Tensor, attention_mask: Tensor | None, cached_buckets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's residual ``(batch, length, dim)`` and the hash buckets of the positions."""
        attended, buckets = self.attention(self.attention_norm(x), attention_mask, cached_buckets)
        return self.dropout(attended), buckets

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward residual, ``(batch, length, dim)``."""
        if self.feed_forward_chunk_size == 0 or x.shape[1] <= self.feed_forward_chunk_size:
            return self._feed_forward_chunk(x)
        chunks = torch.split(x, self.feed_forward_chunk_size, dim=1)  # type: ignore[no-untyped-call]
        if not torch.is_grad_enabled():
            return torch.cat([self._feed_forward_chunk(chunk) for chunk in chunks], dim=1)
        # Without checkpointing, the activations of all chunks would be stored and chunking would save nothing.
        return torch.cat([checkpoint(self._feed_forward_chunk, chunk, use_reentrant=False) for chunk in chunks], dim=1)

    def _feed_forward_chunk(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.dropout(self.up(self.feed_forward_norm(x))))
        return cast(Tensor, self.dropout(self.down(hidden)))


class Reformer(PretrainedModel):
    """A decoder or encoder of reversible layers.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the hidden states.
        heads: Heads per layer.
        attentions: One attention factory per layer, given dim, heads and causal.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        positions: Factory of the position embeddings, given dim. Defaults to 4096 learned positions.
        causal: If True, a query sees no later positions: the model is a decoder.
        pad_token_id: Token that pads a text to whole chunks.
        activation: Factory of the feed-forward activation.
        feed_forward_chunk_size: Positions that a feed-forward part processes at a time; 0 for all.
        add_lm_head: If True, add an output projection to the vocabulary.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings and the residual branches.

    Raises:
        MemtxError: A number is out of range, or numbers do not fit each other.
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
        check_at_least(0, feed_forward_chunk_size=feed_forward_chunk_size)
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.pad_token_id = vocab_size, dim, pad_token_id
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
        """Initialize as published: normal weights, zero biases, unit norms, unit-variance axial positions."""
        init_normal(self.embedding, std)
        init_normal(self.positions, std)
        if isinstance(self.positions, AxialPositionEmbeddings):
            for weight in self.positions.weights:
                nn.init.normal_(weight)
        init_normal(self.blocks, std)
        if self.head is not None:
            init_normal(self.head, std)

    def _layers(self) -> list[ReformerBlock]:
        return cast(list[ReformerBlock], list(self.blocks))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, output_hidden_states: bool = False
    ) -> EncoderOutput:
        """Read whole texts; the arguments have the names of the ``transformers`` library.

        Args:
            input_ids: ``(batch, length)`` int64, padded to whole chunks internally.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding; None for no padding.
            output_hidden_states: If True, return the hidden states; the backward pass then stores all of them.

        Returns:
            Output whose last hidden state is ``(batch, length, 2 dim)``, both streams concatenated and normalized; the
            hidden states are the embedding's output and every layer's second stream.

        Raises:
            MemtxError: Shapes do not fit each other, or a text is too long.
        """
        check_token_ids("input_ids", input_ids, attention_mask=attention_mask)
        length = input_ids.shape[1]
        tokens, mask = self._pad_to_chunks(input_ids, attention_mask)
        if tokens.shape[1] > self.positions.max_length:
            num_positions = self.positions.max_length
            message = f"A text of {length} tokens needs {tokens.shape[1]} positions, the model has {num_positions}."
            raise MemtxError(message, "Shorten the text, or use a model with more positions.")
        x = self.dropout(self.embedding(tokens)) + self.dropout(self.positions(tokens.shape[1]))
        x1, x2, hidden = x, x, [x]
        if output_hidden_states or not torch.is_grad_enabled():
            for block in self._layers():
                x1 = x1 + block.attend(x2, mask, None)[0]
                x2 = x2 + block.feed_forward(x1)
                if output_hidden_states:
                    hidden.append(x2)
        else:
            x1, x2 = reversible.reversible_forward(x1, x2, self._layers(), mask)
        x = self.dropout(self.norm(torch.cat([x1, x2], dim=-1)))[:, :length]
        return EncoderOutput(
            x,
            tuple(state[:, :length] for state in hidden) if output_hidden_states else None,
            self.head(x) if self.head is not None else None,
        )

    def _pad_to_chunks(self, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return tokens padded to whole chunks of every layer, and their bool mask; None for no padding."""
        chunk_lengths = {block.attention.chunk_length for block in self._layers()}
        multiple, length = math.lcm(*chunk_lengths), tokens.shape[1]
        mask = None
        if attention_mask is not None and not bool((attention_mask > 0).all()):
            mask = attention_mask > 0
        if length % multiple == 0 or length <= min(chunk_lengths):
            return tokens, mask
        padding = -length % multiple
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        return F.pad(tokens, (0, padding), value=self.pad_token_id), F.pad(mask, (0, padding))
