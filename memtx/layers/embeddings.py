"""What an encoder makes of token numbers: token, position and text embeddings, added up and normed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError


class TextEmbeddings(nn.Module):
    """The sum of three learned tables, normed (BERT, Devlin et al. 2019, figure 2).

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width of the hidden states.
        num_positions: entries of the table of positions: no text may be longer.
        type_vocab_size: kinds of text that tokens may be marked with (question and context, say); 0 for no such table.
        pad_token_id: the token that fills up rows; None for none. Its embedding does not learn.
        roberta_positions: count positions as RoBERTa does (Liu et al. 2019): only tokens other than padding count,
            from ``pad_token_id + 1`` on, and padding takes entry ``pad_token_id``.
        rescale_embeddings: multiply token embeddings by the square root of dim.
        eps: of the norm.
        dropout: of the result.
        dropout_before_norm: drop before the norm, as Big Bird does, instead of after it.
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
    ) -> None:
        super().__init__()
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise MemtxError(
                f"The padding token is {pad_token_id}, the vocabulary has {vocab_size}.", f"Give 0 to {vocab_size - 1}."
            )
        if roberta_positions and pad_token_id is None:
            raise MemtxError("Positions are to be counted by tokens, but there is no padding token.", "Name one.")
        self.pad_token_id = pad_token_id
        self.roberta_positions = roberta_positions
        self.scale = dim**0.5 if rescale_embeddings else 1.0
        self.dropout_before_norm = dropout_before_norm
        self.word_embeddings = nn.Embedding(vocab_size, dim, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(num_positions, dim)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, dim) if type_vocab_size else None
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return (rows, length, dim).

        Args:
            tokens: (rows, length) int64.
            token_type_ids: (rows, length) int64; zeros by default.

        Raises:
            MemtxError: the text is longer than the table of positions, or types are given where there are none.
        """
        x: Tensor = self.word_embeddings(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.token_type_embeddings is not None:
            # One text's row is added everywhere: a look-up would have a gradient for each place.
            x = x + (
                self.token_type_embeddings.weight[0]
                if token_type_ids is None
                else self.token_type_embeddings(token_type_ids)
            )
        elif token_type_ids is not None:
            raise MemtxError("token_type_ids was given to a model that has no types of texts.", "Leave it out.")
        x = x + self.position_embeddings(self._position_ids(tokens))
        if self.dropout_before_norm:
            x = self.dropout(x)
        x = self.norm(x)
        return x if self.dropout_before_norm else self.dropout(x)

    def _position_ids(self, tokens: Tensor) -> Tensor:
        """Return the entry of each place in the table of positions, (rows or 1, length) int64."""
        numbers: Tensor
        if self.roberta_positions:
            assert self.pad_token_id is not None
            counted = tokens.ne(self.pad_token_id)
            numbers = counted.cumsum(1).masked_fill(~counted, 0) + self.pad_token_id
            most = int(numbers.max()) + 1
        else:
            numbers = torch.arange(tokens.shape[1], device=tokens.device)[None]
            most = tokens.shape[1]
        if most > self.position_embeddings.num_embeddings:
            raise MemtxError(
                f"A text of {tokens.shape[1]} tokens needs {most} positions, the model has "
                f"{self.position_embeddings.num_embeddings}.",
                "Cut the text, or use a model with more positions.",
            )
        return numbers
