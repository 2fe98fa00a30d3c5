"""Encoders: whole texts, read both ways. BERT, DistilBERT, Longformer and Big Bird are its parts put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_at_least
from memtx.hf.layout import HFCompatibleModel
from memtx.layers.block import EncoderBlock
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import EncoderAttention, EncoderInputs, FullAttention
from memtx.layers.feed_forward import FeedForward
from memtx.models.masked_head import MaskedLMHead
from memtx.ops.cpu.linear import Linear


@dataclass(frozen=True)
class EncoderOutput:
    """What one call gives.

    Attributes:
        last_hidden_state: (rows, length, dim).
        hidden_states: where asked for, the embedding's output and every layer's, each (rows, length, dim).
        logits: (rows, length, vocab), by a model with a head for masked tokens.
        pooler_output: (rows, dim), by a model with a pooler: what it makes of the first token.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None


class Encoder(HFCompatibleModel):
    """A post-norm encoder.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width of the hidden states.
        depth: layers.
        heads: how many a layer.
        hidden_dim: inner width of the feed-forward parts; 4 dim by default.
        attentions: who sees whom: one entry for all layers alike, or one a layer. Each makes the attention part from
            dim, heads and the layer's number.
        embeddings: makes the embeddings from vocab_size and dim.
        activation: makes the non-linearity of the feed-forward parts.
        add_mlm_head: whether there is a head for masked tokens.
        mlm_head_activation: its non-linearity; the feed-forward parts' by default.
        tie_embeddings: whether that head ends in the token embeddings.
        add_pooling_layer: whether there is a map of the first token, with a tanh after it.
        eps: of the norms.
        dropout: of what each part adds.

    Raises:
        MemtxError: a number is out of range or numbers do not divide as they must.
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
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if len(attentions) not in (1, depth):
            raise MemtxError(
                f"There are {len(attentions)} attentions for {depth} layers.",
                f"Give one for all of them, or {depth}.",
            )
        self.save_init_args(arguments)
        self.vocab_size = vocab_size
        self.dim = dim
        self.depth = depth
        per_layer = list(attentions) if len(attentions) == depth else list(attentions) * depth
        self.embedding = embeddings(vocab_size, dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                attention(dim, heads, layer),
                FeedForward(dim, hidden_dim, activation=activation),
                dim,
                eps,
                dropout,
            )
            for layer, attention in enumerate(per_layer)
        )
        self.pooler = Linear(dim, dim) if add_pooling_layer else None
        self.head = (
            MaskedLMHead(
                dim, vocab_size, tie_weights=tie_embeddings, activation=mlm_head_activation or activation, eps=eps
            )
            if add_mlm_head
            else None
        )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights anew (BERT's rule: normal, biases zero, norms one)."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
            if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                with torch.no_grad():
                    part.weight[part.padding_idx] = 0.0
        if self.head is not None and self.head.weight is not None:
            nn.init.normal_(self.head.weight, std=std)

    @property
    def supports_global_attention(self) -> bool:
        """Whether global tokens can be marked."""
        return any(block.attention.supports_global_attention for block in self._layers())

    @property
    def type_vocab_size(self) -> int:
        """Kinds of text that tokens can be marked with; 0 for none."""
        return (
            0 if self.embedding.token_type_embeddings is None else self.embedding.token_type_embeddings.num_embeddings
        )

    def _layers(self) -> list[EncoderBlock]:
        return cast(list[EncoderBlock], list(self.blocks))

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
        """Read whole texts; arguments bear the names of the ``transformers`` library.

        Args:
            input_ids: (rows, length) int64.
            attention_mask: (rows, length), 0 for padding and 1 for a token; None for no padding.
            token_type_ids: (rows, length) int64, which text a token is of; None for 0 everywhere.
            global_attention_mask: (rows, length), 1 for a token that sees all and is seen by all (Longformer).
            random_blocks: layer -> (heads, blocks - 2, r) int64, the random blocks that each block but the first and
                the last sees (Big Bird); the layer draws its own where it has no entry.
            output_hidden_states: whether to return hidden states.
            logits_mask: (rows, length) bool, the places whose logits are wanted, (n, vocab); all by default.

        Raises:
            MemtxError: shapes do not fit each other, a text is too long, or the model does not know such an argument.
        """
        self._check_inputs(input_ids, attention_mask, token_type_ids, global_attention_mask, random_blocks)
        reading = EncoderInputs.from_masks(input_ids, attention_mask, global_attention_mask, random_blocks)
        x = self.embedding(input_ids, token_type_ids)
        hidden = [x]
        for block in self._layers():
            x = block(x, reading)
            if output_hidden_states:
                hidden.append(x)
        asked = x if logits_mask is None else x[logits_mask]
        return EncoderOutput(
            x,
            tuple(hidden) if output_hidden_states else None,
            self.head(asked, self.embedding.word_embeddings.weight) if self.head is not None else None,
            torch.tanh(self.pooler(x[:, 0])) if self.pooler is not None else None,
        )

    def _check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        global_attention_mask: Tensor | None,
        random_blocks: Mapping[int, Tensor] | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise MemtxError(
                f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}, expected int64 (rows, length), "
                "length at least 1.",
                "Reshape it; one text alone is input_ids[None].",
            )
        masks = (
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
            ("global_attention_mask", global_attention_mask),
        )
        for name, given in masks:
            if given is not None and given.shape != input_ids.shape:
                raise MemtxError(
                    f"{name} is {tuple(given.shape)}, expected {tuple(input_ids.shape)}.", "Match input_ids."
                )
        attentions = [block.attention for block in self._layers()]
        if global_attention_mask is not None and not self.supports_global_attention:
            raise MemtxError("global_attention_mask was given to a model without global tokens.", "Leave it out.")
        for layer in random_blocks or {}:
            if not (0 <= layer < self.depth and attentions[layer].supports_random_blocks):
                raise MemtxError(f"random_blocks was given for layer {layer}, which has none.", "Leave it out.")
