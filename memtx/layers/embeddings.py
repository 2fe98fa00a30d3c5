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
        positions: entries of the table of positions: no text may be longer.
        types: kinds of text that tokens may be marked with (question and context, say); 0 for no such table.
        padding: the token that fills up rows; None for none. Its embedding does not learn.
        numbered_by_tokens: count positions as RoBERTa does (Liu et al. 2019): only tokens other than padding count,
            from ``padding + 1`` on, and padding takes entry ``padding``.
        scaled: multiply token embeddings by the square root of dim.
        eps: of the norm.
        dropout: of the result.
        dropout_first: drop before the norm, as Big Bird does, instead of after it.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        positions: int = 512,
        *,
        types: int = 0,
        padding: int | None = None,
        numbered_by_tokens: bool = False,
        scaled: bool = False,
        eps: float = 1e-12,
        dropout: float = 0.0,
        dropout_first: bool = False,
    ) -> None:
        super().__init__()
        if padding is not None and not 0 <= padding < vocab_size:
            raise MemtxError(
                f"The padding token is {padding}, the vocabulary has {vocab_size}.", f"Give 0 to {vocab_size - 1}."
            )
        if numbered_by_tokens and padding is None:
            raise MemtxError("Positions are to be counted by tokens, but there is no padding token.", "Name one.")
        self.padding = padding
        self.numbered_by_tokens = numbered_by_tokens
        self.scale = dim**0.5 if scaled else 1.0
        self.dropout_first = dropout_first
        self.tokens = nn.Embedding(vocab_size, dim, padding_idx=padding)
        self.positions = nn.Embedding(positions, dim)
        self.types = nn.Embedding(types, dim) if types else None
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Return (rows, length, dim).

        Args:
            tokens: (rows, length) int64.
            token_types: (rows, length) int64; zeros by default.

        Raises:
            MemtxError: the text is longer than the table of positions, or types are given where there are none.
        """
        x: Tensor = self.tokens(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.types is not None:
            # One text's row is added everywhere: a look-up would have a gradient for each place.
            x = x + (self.types.weight[0] if token_types is None else self.types(token_types))
        elif token_types is not None:
            raise MemtxError("token_type_ids was given to a model that has no types of texts.", "Leave it out.")
        x = x + self.positions(self._numbers(tokens))
        if self.dropout_first:
            x = self.dropout(x)
        x = self.norm(x)
        return x if self.dropout_first else self.dropout(x)

    def _numbers(self, tokens: Tensor) -> Tensor:
        """Return the entry of each place in the table of positions, (rows or 1, length) int64."""
        numbers: Tensor
        if self.numbered_by_tokens:
            assert self.padding is not None
            counted = tokens.ne(self.padding)
            numbers = counted.cumsum(1).masked_fill(~counted, 0) + self.padding
            most = int(numbers.max()) + 1
        else:
            numbers = torch.arange(tokens.shape[1], device=tokens.device)[None]
            most = tokens.shape[1]
        if most > self.positions.num_embeddings:
            raise MemtxError(
                f"A text of {tokens.shape[1]} tokens needs {most} positions, the model has "
                f"{self.positions.num_embeddings}.",
                "Cut the text, or use a model with more positions.",
            )
        return numbers
