"""Encoder-decoders: a text is encoded once, and another is decoded token by token while attending to it.

With a Longformer's encoder, this is LED (Beltagy et al. 2020, section 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.cross_attention import DecoderBlock, KeyValue
from memtx.models.encoder import Encoder, init_normal
from memtx.models.validation import check_token_ids
from memtx.ops.cpu.linear import linear
from memtx.ops.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class DecoderState:
    """State of a decoder between two calls.

    Attributes:
        past: Keys and values of the decoded positions by layer, of ``rows``; empty at the beginning.
        source: Keys and values of the encoded texts by layer, of ``batch``.
        source_mask: ``(batch, 1, 1, length)`` bool, False for padding; None without any.
    """

    past: tuple[KeyValue, ...]
    source: tuple[KeyValue, ...]
    source_mask: Tensor | None

    @property
    def length(self) -> int:
        """Number of decoded positions."""
        return self.past[0].key.shape[2] if self.past else 0

    def select(self, index: Tensor) -> DecoderState:
        """Return the state of rows by index, ``(n,)`` int64; each text keeps as many rows as it had."""
        return replace(self, past=tuple(KeyValue(*(part[index] for part in layer)) for layer in self.past))


@dataclass(frozen=True)
class EncoderDecoderOutput:
    """Output of one call.

    Attributes:
        logits: ``(batch, target length, vocab)``.
        encoder_last_hidden_state: ``(batch, length, dim)``.
    """

    logits: Tensor
    encoder_last_hidden_state: Tensor


class EncoderDecoder(PretrainedModel):
    """An encoder-decoder whose embeddings serve encoder, decoder and output.

    Args:
        vocab_size: Number of token ids.
        encoder: Factory of the encoder, given vocab_size; without a head.
        depth: Layers of the decoder.
        heads: Heads per layer of the decoder.
        hidden_dim: Hidden width of its feed-forward parts. Defaults to 4 dim.
        num_positions: Position embeddings of the decoder; no target may be longer.
        start_token_id: Id that every target begins with.
        activation: Factory of the feed-forward activation.
        eps: Epsilon of the norms.
        dropout: Dropout rate of embeddings and residual branches.
        attention_dropout: Dropout rate of the attention weights.
        attention_bias: If True, the projections of the decoder's attentions have biases.
        pre_norm: If True, layers of the decoder normalize before their parts and the decoder at its end, not at its
            beginning.

    Raises:
        MemtxError: A number is out of range or not divisible as required.
    """

    logits_bias: Tensor

    def __init__(
        self,
        vocab_size: int,
        encoder: Callable[[int], Encoder],
        depth: int = 6,
        heads: int = 4,
        hidden_dim: int | None = None,
        num_positions: int = 1024,
        start_token_id: int = 2,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention_bias: bool = True,
        pre_norm: bool = False,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, depth=depth, heads=heads, num_positions=num_positions)
        if not 0 <= start_token_id < vocab_size:
            message = f"start_token_id is {start_token_id}, but the vocabulary has {vocab_size} tokens."
            raise MemtxError(message, f"Give 0 to {vocab_size - 1}.")
        self.save_init_args(arguments)
        self.vocab_size, self.depth, self.start_token_id = vocab_size, depth, start_token_id
        self.encoder = encoder(vocab_size)
        self.dim = dim = self.encoder.dim
        self.position_embeddings = nn.Embedding(num_positions, dim)
        self.embedding_norm: nn.Module = nn.Identity() if pre_norm else nn.LayerNorm(dim, eps=eps)
        self.norm: nn.Module = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(dropout)
        dropouts = dropout, attention_dropout
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, heads, hidden_dim, activation, eps, *dropouts, attention_bias, pre_norm)
            for _ in range(depth)
        )
        self.register_buffer("logits_bias", torch.zeros(1, vocab_size))
        init_normal(self)

    def _layers(self) -> list[DecoderBlock]:
        return cast(list[DecoderBlock], list(self.blocks))

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, global_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the encoder's output, ``(batch, length, dim)``; arguments as for :class:`Encoder`.

        An encoder without global tokens gets no mask of them.
        """
        if not self.encoder.supports_global_attention:
            global_attention_mask = None
        output = self.encoder(input_ids, attention_mask, global_attention_mask=global_attention_mask)
        return cast(Tensor, output.last_hidden_state)

    def start(self, hidden: Tensor, attention_mask: Tensor | None = None) -> DecoderState:
        """Return the state that decodes texts from their beginning.

        Args:
            hidden: Output of :meth:`encode`, ``(batch, length, dim)``.
            attention_mask: ``(batch, length)``, 0 for padding. None for no padding.
        """
        mask = None if attention_mask is None else (attention_mask > 0)[:, None, None]
        return DecoderState((), tuple(block.cross_attention.project(hidden) for block in self._layers()), mask)

    def decode(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return the logits of the next tokens, ``(rows, length, vocab)``, and the state after tokens.

        Args:
            tokens: ``(rows, length)`` int64, whose rows follow text by text; one position if others were decoded.
            state: State before them.

        Raises:
            MemtxError: The target is longer than the model's positions, or several tokens follow others.
        """
        check_token_ids("tokens", tokens)
        first, length = state.length, tokens.shape[1]
        if first and length > 1:
            raise MemtxError(f"{length} tokens follow {first} others.", "Decode one at a time after the first call.")
        if first + length > self.position_embeddings.num_embeddings:
            message = f"The target has {first + length} tokens, the decoder {self.position_embeddings.num_embeddings}"
            raise MemtxError(f"{message} positions.", "Cut it, or lower max_length.")
        embedding = self.encoder.embedding
        x = embedding.word_embeddings(tokens) * embedding.scale
        x = x + self.position_embeddings.weight[first : first + length]
        x, past = self.embedding_dropout(self.embedding_norm(x)), []
        for layer, block in enumerate(self._layers()):
            layer_past = state.past[layer] if state.past else None
            x, seen = block(x, layer_past, state.source[layer], state.source_mask)
            past.append(seen)
        x, weight = self.norm(x), embedding.word_embeddings.weight
        return linear(x, weight, self.logits_bias[0]), replace(state, past=tuple(past))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> EncoderDecoderOutput:
        """Encode texts and decode their targets with the true tokens as inputs.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding. None for no padding.
            global_attention_mask: ``(batch, length)``, 1 for a token that sees and is seen by all.
            decoder_input_ids: ``(batch, target length)`` int64, start token first.
            labels: ``(batch, target length)`` int64, -100 for padding, from which the inputs are made if they are not
                given: the start token, then all labels but the last.

        Raises:
            MemtxError: Neither or both of inputs and labels are given, or shapes do not fit.
        """
        if (decoder_input_ids is None) == (labels is None):
            raise MemtxError("The target is not given once.", "Give decoder_input_ids or labels.")
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = self.shift_labels(labels)
        hidden = self.encode(input_ids, attention_mask, global_attention_mask)
        logits, _ = self.decode(decoder_input_ids, self.start(hidden, attention_mask))
        return EncoderDecoderOutput(logits, hidden)

    def shift_labels(self, labels: Tensor) -> Tensor:
        """Return the decoder's inputs for labels, both ``(batch, target length)`` int64; -100 becomes any token."""
        shifted = labels.masked_fill(labels == IGNORE_INDEX, 0).roll(1, dims=1)
        shifted[:, 0] = self.start_token_id
        return shifted
