"""XLNet (Yang et al. 2019): an encoder pretrained to predict tokens in permuted orders, and bidirectional in use."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.xlnet import TwoStreamBlock, bidirectional_sinusoids
from memtx.models.encoder import EncoderOutput, init_normal
from memtx.models.validation import check_token_ids


class XLNet(PretrainedModel):
    """A post-norm encoder with two streams in pretraining and one in use.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the hidden states, even.
        depth: Number of layers.
        heads: Heads per layer.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings and the residual branches.

    Raises:
        MemtxError: A number is out of range or not divisible as required.
    """

    supports_global_attention = False
    type_vocab_size = 0

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        hidden_dim: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if dim % 2 or dim % heads:
            message = f"dim ({dim}) must be even and divisible by heads ({heads})."
            raise MemtxError(message, "Choose another dim or heads.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mask_embedding = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(TwoStreamBlock(dim, heads, hidden_dim, eps, dropout) for _ in range(depth))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(dropout)
        init_normal(self)
        nn.init.normal_(self.mask_embedding, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permutation_rank: Tensor | None = None,
        logits_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode whole texts, or predict their tokens in a permuted order.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding; None for no padding.
            permutation_rank: ``(batch, length)`` int64, rank of each position in the order; the output then has logits.
                None encodes bidirectionally.
            logits_mask: ``(batch, length)`` bool, positions to compute logits for. Defaults to all.

        Raises:
            MemtxError: Shapes do not fit each other.
        """
        per_token = {"attention_mask": attention_mask, "permutation_rank": permutation_rank, "logits_mask": logits_mask}
        check_token_ids("input_ids", input_ids, **per_token)
        content = self.dropout(self.embedding(input_ids))
        length = input_ids.shape[1]
        sinusoids = self.dropout(bidirectional_sinusoids(length, content))
        is_token = torch.ones(1, 1, length, dtype=torch.bool, device=content.device)
        if attention_mask is not None:
            is_token = attention_mask[:, None] > 0
        if permutation_rank is None:
            visible = is_token.expand(-1, length, -1)
            for block in self._layers():
                content = block(content, content, sinusoids, visible)
            return EncoderOutput(content)
        up_to_itself = (permutation_rank[:, None] <= permutation_rank[:, :, None]) & is_token
        before_itself = (permutation_rank[:, None] < permutation_rank[:, :, None]) & is_token
        query = self.dropout(self.mask_embedding).expand_as(content)
        for layer, block in enumerate(self._layers()):
            # Both streams attend to the content of the same layer.
            query = block(query, content, sinusoids, before_itself)
            if layer + 1 < self.depth:
                content = block(content, content, sinusoids, up_to_itself)
        if logits_mask is not None:
            query = query[logits_mask]
        return EncoderOutput(content, logits=nn.functional.linear(query, self.embedding.weight, self.bias))

    def _layers(self) -> list[TwoStreamBlock]:
        return cast(list[TwoStreamBlock], list(self.blocks))
