"""Transformer-XL (Dai et al. 2019): a decoder whose layers see the hidden states of previous segments.

As published, an empty memory consists of zeros, which are visible: a fresh stream sees as many keys as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.feed_forward import FeedForward
from memtx.layers.lm_head import AdaptiveEmbedding, AdaptiveSoftmax, NoHead, VocabClusters
from memtx.layers.transformer_xl import RelativeAttention, TransformerXLBlock, TransformerXLMemory, distance_embeddings
from memtx.memory.base import Losses
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.segmented_forward import LayerStates
from memtx.segment import Segment


class TransformerXL(MemoryTransformer):
    """A decoder with relative positions, a cache of hidden states, and an adaptive softmax.

    Args:
        vocab_size: Number of token ids, frequent tokens first.
        dim: Width of the hidden states.
        depth: Number of layers.
        heads: Heads per layer.
        head_dim: Width of a head. Defaults to dim / heads.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        memory_length: Number of hidden states carried per layer.
        same_length: If True, every query sees ``memory_length`` positions, itself included, so that segmentation does
            not matter; otherwise it sees the whole cache and the earlier tokens of its segment.
        clamp_length: Largest distance that is told apart; 0 or less for no limit.
        embed_dim: Width of the embeddings of the first cluster. Defaults to ``dim``.
        cutoffs: First token of each further cluster of the vocabulary.
        div_value: Factor by which each cluster's embeddings are narrower than the previous cluster's.
        tie_embeddings: If True, the output weights are the embeddings.
        tie_projections: For each cluster, whether its output projection is the embedding's. Defaults to all but the
            first, as published.
        share_biases: If True, all layers share the biases u and v.
        pre_norm: If True, normalize before each part instead of after it.
        add_lm_head: If True, add the softmax; ``logits`` is None without it.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings and the residual branches.
        attention_dropout: Dropout rate of the attention weights.

    Raises:
        MemtxError: A number is out of range, or numbers do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        memory_length: int = 512,
        same_length: bool = False,
        clamp_length: int = -1,
        embed_dim: int | None = None,
        cutoffs: Sequence[int] = (),
        div_value: int = 1,
        tie_embeddings: bool = True,
        tie_projections: Sequence[bool] | None = None,
        share_biases: bool = False,
        pre_norm: bool = False,
        add_lm_head: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        arguments = dict(locals())
        PretrainedModel.__init__(self)  # not MemoryTransformer's, which creates other parts
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        check_at_least(1 if same_length else 0, memory_length=memory_length)
        if dim % 2:
            raise MemtxError(f"dim is {dim}, expected an even number.", "Choose another dim.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth, self.clamp_length = vocab_size, dim, depth, clamp_length
        self.activation_checkpointing = False
        clusters = VocabClusters(vocab_size, cutoffs, embed_dim if embed_dim is not None else dim, div_value)
        self.embedding, self.absolute_positions = AdaptiveEmbedding(clusters, dim), None
        self.dropout = nn.Dropout(dropout)
        attention = partial(
            RelativeAttention, dim, heads, head_dim=head_dim, clamp_length=clamp_length, has_biases=not share_biases,
            dropout=attention_dropout,
        )  # fmt: skip
        blocks = [
            TransformerXLBlock(
                attention(TransformerXLMemory(dim, memory_length, same_length)),
                FeedForward(dim, hidden_dim, dropout, activation=nn.ReLU),
                dim,
                eps,
                dropout,
                pre_norm,
            )
            for _ in range(depth)
        ]
        bias_shape = heads, blocks[0].attention.head_dim
        self.content_bias = nn.Parameter(torch.zeros(bias_shape)) if share_biases else None
        self.position_bias = nn.Parameter(torch.zeros(bias_shape)) if share_biases else None
        self.blocks = nn.ModuleList(blocks)
        self.init_memory_tokens()
        self.output_memory = None
        self.norm = nn.Dropout(dropout)  # as published, there is no last norm
        head = partial(AdaptiveSoftmax, tie_embeddings=tie_embeddings, tie_projections=tie_projections)
        self.head = head(self.embedding) if add_lm_head else NoHead()
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, projection_std: float = 0.01) -> None:
        """Initialize all weights as published: normal weights, zero biases, unit norms."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=projection_std if ".projections." in name else std)
                elif "norm" not in name:
                    nn.init.zeros_(parameter)

    def _run_layers(
        self, x: Tensor, states: Sequence[tuple[Any, ...]], segment: Segment, keep_hidden_states: bool
    ) -> tuple[list[Tensor], LayerStates, Losses]:
        """Return hidden states, next states and losses; the layers share the embeddings of the distances."""
        num_keys = states[0][0].hidden.shape[1] + segment.length
        # Computed here because a layer that is recomputed in the backward pass must not draw this dropout again.
        sinusoids = self.dropout(distance_embeddings(num_keys, self.dim, self.clamp_length, x))
        segment.memo("distance inputs", lambda: (sinusoids, self.content_bias, self.position_bias))
        return super()._run_layers(x, states, segment, keep_hidden_states)
