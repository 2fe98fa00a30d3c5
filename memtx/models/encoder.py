"""Bidirectional encoders: BERT, DistilBERT, Longformer and Big Bird, which differ in their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.block import EncoderBlock
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderAttention, EncoderInputs, FullAttention
from memtx.layers.feed_forward import FeedForward
from memtx.models.validation import check_token_ids
from memtx.ops.cpu.linear import Linear, linear


@dataclass(frozen=True)
class EncoderOutput:
    """Output of one call.

    Attributes:
        last_hidden_state: ``(batch, length, dim)``; twice as wide for a Reformer.
        hidden_states: If requested, outputs of the embedding and of every layer, each ``(batch, length, dim)``.
        logits: ``(batch, length, vocab)``, or ``(n, vocab)`` for n selected positions; None without a head.
        pooler_output: ``(batch, dim)``, computed from the first token; None without a pooler.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None


class MaskedLMHead(nn.Module):
    """Head that predicts masked tokens (BERT, Devlin et al. 2019, section 3.1): linear, activation, norm, vocabulary.

    Args:
        dim: Width of the hidden states.
        vocab_size: Vocabulary size.
        tie_weights: If True, the last weights are the token embeddings, passed to each call.
        activation: Factory of the activation.
        eps: Epsilon of the norm.
    """

    def __init__(
        self, dim: int, vocab_size: int, *, tie_weights: bool, activation: Callable[[], nn.Module] = nn.GELU, eps: float
    ) -> None:
        super().__init__()
        self.transform = Linear(dim, dim)
        self.activation = activation()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.weight = None if tie_weights else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding_weight: Tensor) -> Tensor:
        """Return logits ``(..., vocab)`` for x ``(..., dim)``; embedding_weight: ``(vocab, dim)``."""
        x = self.norm(self.activation(self.transform(x)))
        return linear(x, embedding_weight if self.weight is None else self.weight, self.bias)


class Encoder(PretrainedModel):
    """An encoder.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the hidden states.
        depth: Number of layers.
        heads: Heads per layer.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        attentions: Attention factories, given dim, heads and the layer's index: one for all layers, or one per layer.
        embeddings: Factory of the embeddings, given vocab_size and dim.
        activation: Factory of the feed-forward activation.
        add_mlm_head: If True, add a head for masked tokens.
        mlm_head_activation: Factory of its activation. Defaults to ``activation``.
        tie_embeddings: If True, the head's last weights are the token embeddings.
        add_pooling_layer: If True, add a linear layer and a tanh for the first token.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the residual branches.
        pre_norm: If True, layers normalize before their parts and the encoder at its end; otherwise after each part.

    Raises:
        MemtxError: A number is out of range or not divisible as required.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        hidden_dim: int | None = None,
        attentions: Sequence[Callable[[int, int, int], EncoderAttention]] = (FullAttention,),
        embeddings: Callable[[int, int], TextEmbeddings] = TextEmbeddings,
        activation: Callable[[], nn.Module] = nn.GELU,
        add_mlm_head: bool = True,
        mlm_head_activation: Callable[[], nn.Module] | None = None,
        tie_embeddings: bool = True,
        add_pooling_layer: bool = False,
        eps: float = 1e-12,
        dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if len(attentions) not in (1, depth):
            message = f"There are {len(attentions)} attentions for {depth} layers."
            raise MemtxError(message, f"Give one for all layers, or {depth}.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.embedding = embeddings(vocab_size, dim)
        self.blocks = nn.ModuleList()
        for layer, attention in enumerate(attentions if len(attentions) == depth else list(attentions) * depth):
            parts = (attention(dim, heads, layer), FeedForward(dim, hidden_dim, activation=activation))
            self.blocks.append(EncoderBlock(*parts, dim, eps, dropout, pre_norm))
        self.norm: nn.Module = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        self.pooler = Linear(dim, dim) if add_pooling_layer else None
        self.head = None
        if add_mlm_head:
            head_activation = mlm_head_activation or activation
            self.head = MaskedLMHead(dim, vocab_size, tie_weights=tie_embeddings, activation=head_activation, eps=eps)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialize all weights by BERT's rule: normal weights, zero biases, unit norms."""
        init_normal(self, std)
        if self.head is not None and self.head.weight is not None:
            nn.init.normal_(self.head.weight, std=std)

    @property
    def supports_global_attention(self) -> bool:
        """If True, ``global_attention_mask`` can mark global tokens."""
        return any(block.attention.supports_global_attention for block in self._layers())

    @property
    def type_vocab_size(self) -> int:
        """Number of token types; 0 without token type embeddings."""
        embeddings = self.embedding.token_type_embeddings
        return 0 if embeddings is None else embeddings.num_embeddings

    def _layers(self) -> list[EncoderBlock]:
        return cast(list[EncoderBlock], list(self.blocks))

    def predict_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the logits ``(..., vocab)`` of last-layer outputs ``(..., dim)``; the model needs its head."""
        assert self.head is not None
        logits: Tensor = self.head(hidden_states, self.embedding.word_embeddings.weight)
        return logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        random_blocks: Mapping[int, Tensor] | None = None,
        output_hidden_states: bool = False,
        logits_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode whole texts; the arguments have the names of the ``transformers`` library.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding; None for no padding.
            token_type_ids: ``(batch, length)`` int64, index of the text a token belongs to. Defaults to 0.
            global_attention_mask: ``(batch, length)``, 1 for a token that sees and is seen by all (Longformer).
            random_blocks: Layer -> ``(heads, num_blocks - 2, r)`` int64, random blocks that each block but the first
                and last sees (Big Bird). Layers without an entry sample their own.
            output_hidden_states: If True, return the hidden states.
            logits_mask: ``(batch, length)`` bool, positions to compute logits for. Defaults to all.

        Raises:
            MemtxError: Shapes do not fit each other, a text is too long, or the model does not support an argument.
        """
        masks = {"attention_mask": attention_mask, "global_attention_mask": global_attention_mask}
        check_token_ids("input_ids", input_ids, token_type_ids=token_type_ids, **masks)
        if global_attention_mask is not None and not self.supports_global_attention:
            raise MemtxError("global_attention_mask was given to a model without global tokens.", "Remove it.")
        attentions = [block.attention for block in self._layers()]
        for layer in random_blocks or {}:
            if not (0 <= layer < self.depth and attentions[layer].supports_random_blocks):
                raise MemtxError(f"random_blocks has an entry for layer {layer}, which uses none.", "Remove it.")
        inputs = EncoderInputs.from_masks(input_ids, attention_mask, global_attention_mask, random_blocks)
        x = self.embedding(input_ids, token_type_ids)
        hidden = [x]
        for block in self._layers():
            x = block(x, inputs)
            if output_hidden_states:
                hidden.append(x)
        x = self.norm(x)
        selected = x if logits_mask is None else x[logits_mask]
        return EncoderOutput(
            x,
            tuple(hidden) if output_hidden_states else None,
            self.predict_tokens(selected) if self.head is not None else None,
            torch.tanh(self.pooler(x[:, 0])) if self.pooler is not None else None,
        )


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Initialize linear layers and embeddings: normal weights, zero biases, zero padding embeddings."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx] = 0.0
