"""An encoder that learns by guessing tokens in any order (XLNet, Yang et al. 2019); used, it reads both ways."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from memtx.checkpoint import pretrained
from memtx.errors import MemtxError, check_at_least
from memtx.layers.xlnet import TwoStreamBlock, bidirectional_sinusoids
from memtx.models.encoder import EncoderOutput


class XLNet(pretrained.PretrainedModel):
    """A post-norm encoder with two streams in training and one in use.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width of the hidden states, even.
        depth: layers.
        heads: how many a layer.
        hidden_dim: inner width of the feed-forward parts; 4 dim by default.
        eps: of the norms.
        dropout: of embeddings and of what each part adds.

    Raises:
        MemtxError: a number is out of range or numbers do not divide as they must.
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
            raise MemtxError(f"dim is {dim}, expected an even number that {heads} heads divide.", "Choose another.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mask_embedding = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(TwoStreamBlock(dim, heads, hidden_dim, eps, dropout) for _ in range(depth))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(dropout)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        nn.init.normal_(self.mask_embedding, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permutation_rank: Tensor | None = None,
        logits_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Read whole texts: both ways, or in an order in which some tokens are guessed.

        Args:
            input_ids: (rows, length) int64.
            attention_mask: (rows, length), 0 for padding and 1 for a token; None for no padding.
            permutation_rank: (rows, length) int64, when each place is read; None to read both ways. ``logits`` are then
                given.
            logits_mask: (rows, length) bool, the places whose logits (n, vocab) are wanted; all (rows, length, vocab)
                by default.

        Raises:
            MemtxError: shapes do not fit each other.
        """
        for name, given in (
            ("attention_mask", attention_mask),
            ("permutation_rank", permutation_rank),
            ("logits_mask", logits_mask),
        ):
            if given is not None and given.shape != input_ids.shape:
                raise MemtxError(f"{name} is {tuple(given.shape)}, expected {tuple(input_ids.shape)}.", "Match them.")
        content = self.dropout(self.embedding(input_ids))
        length = input_ids.shape[1]
        distances = self.dropout(bidirectional_sinusoids(length, content))
        there = torch.ones(1, 1, length, dtype=torch.bool, device=content.device)
        if attention_mask is not None:
            there = attention_mask[:, None] > 0
        if permutation_rank is None:
            seen = there.expand(-1, length, -1)
            for block in self._layers():
                content = block(content, content, distances, seen)
            return EncoderOutput(content)
        up_to = (permutation_rank[:, None] <= permutation_rank[:, :, None]) & there
        before = (permutation_rank[:, None] < permutation_rank[:, :, None]) & there
        guess = self.dropout(self.mask_embedding).expand_as(content)
        for layer, block in enumerate(self._layers()):
            # Both ask the same layer's content.
            guess = block(guess, content, distances, before)
            if layer + 1 < self.depth:
                content = block(content, content, distances, up_to)
        if logits_mask is not None:
            guess = guess[logits_mask]
        return EncoderOutput(content, logits=nn.functional.linear(guess, self.embedding.weight, self.bias))

    def _layers(self) -> list[TwoStreamBlock]:
        return cast(list[TwoStreamBlock], list(self.blocks))
