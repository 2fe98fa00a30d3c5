"""Input embeddings of an encoder: token, position and type embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError


class TextEmbeddings(nn.Module):
    """The normalized sum of token, position and type embeddings (BERT, Devlin et al. 2019, figure 2).

    Args:
        vocab_size: Vocabulary size.
        dim: Width of the hidden states.
        num_positions: Number of position embeddings; no text may be longer.
        type_vocab_size: Number of token types (such as question and context); 0 for no type embeddings.
        pad_token_id: Id of the padding token, whose embedding is not trained. None if there is none.
        roberta_positions: If True, count positions as RoBERTa does (Liu et al. 2019): only tokens other than padding
            count, from ``pad_token_id + 1`` on, and padding is at position ``pad_token_id``.
        rescale_embeddings: If True, multiply token embeddings by the square root of dim.
        eps: Epsilon of the norm.
        dropout: Dropout rate of the result.
        dropout_before_norm: If True, apply dropout before the norm, as BigBird does, instead of after it.
        normalize: If True, normalize the sum; an encoder with norms before its parts does not need it.

    Raises:
        MemtxError: pad_token_id is outside the vocabulary, or missing with ``roberta_positions``.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_positions: int = 512,
        *,
        type_vocab_size: int = 0,
        pad_token_id: int | None = None,
        roberta_positions: bool = False,
        rescale_embeddings: bool = False,
        eps: float = 1e-12,
        dropout: float = 0.0,
        dropout_before_norm: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise MemtxError(
                f"pad_token_id is {pad_token_id}, but the vocabulary has {vocab_size} tokens.",
                f"Give 0 to {vocab_size - 1}.",
            )
        if roberta_positions and pad_token_id is None:
            raise MemtxError("roberta_positions counts tokens other than padding.", "Give pad_token_id.")
        self.pad_token_id = pad_token_id
        self.roberta_positions = roberta_positions
        self.scale = dim**0.5 if rescale_embeddings else 1.0
        self.dropout_before_norm = dropout_before_norm
        self.word_embeddings = nn.Embedding(vocab_size, dim, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(num_positions, dim)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, dim) if type_vocab_size else None
        self.norm: nn.Module = nn.LayerNorm(dim, eps=eps) if normalize else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Embed tokens as ``(batch, length, dim)``; ids and types are ``(batch, length)`` int64, types zero by default.

        Raises:
            MemtxError: The text has more positions than there are embeddings, or types are given but not supported.
        """
        x: Tensor = self.word_embeddings(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            # Adding a single vector avoids a lookup, whose gradient would be as large as the batch.
            table, has_types = self.token_type_embeddings, token_type_ids is not None
            x = x + (table(token_type_ids) if has_types else table.weight[0])
        elif token_type_ids is not None:
            raise MemtxError("token_type_ids was given, but the model has no token types.", "Remove token_type_ids.")
        x = x + self.position_embeddings(self._position_ids(tokens))
        if self.dropout_before_norm:
            x = self.dropout(x)
        x = self.norm(x)
        return x if self.dropout_before_norm else self.dropout(x)

    def _position_ids(self, tokens: Tensor) -> Tensor:
        """Return the index of each token's position embedding, ``(batch or 1, length)`` int64."""
        position_ids: Tensor
        if self.roberta_positions:
            assert self.pad_token_id is not None
            is_token = tokens.ne(self.pad_token_id)
            position_ids = is_token.cumsum(1).masked_fill(~is_token, 0) + self.pad_token_id
            num_positions = int(position_ids.max()) + 1
        else:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
            num_positions = tokens.shape[1]
        if num_positions > self.position_embeddings.num_embeddings:
            raise MemtxError(
                f"A text of {tokens.shape[1]} tokens needs {num_positions} positions, the model has "
                f"{self.position_embeddings.num_embeddings}.",
                "Cut the text, or use a model with more positions.",
            )
        return position_ids
