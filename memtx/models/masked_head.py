"""From hidden states to the vocabulary, for tokens that were masked (BERT, Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memtx.ops.cpu.linear import Linear, linear


class MaskedLMHead(nn.Module):
    """A linear map, an activation, a norm, and the vocabulary.

    Args:
        dim: width of the hidden states.
        vocab_size: scores a place.
        tie_weights: the last map's weights are the token embeddings, given with each call.
        activation: makes what follows the first map.
        eps: of the norm.
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
        """Return scores (..., vocab).

        Args:
            x: (..., dim).
            embedding_weight: (vocab, dim), the token embeddings.
        """
        x = self.norm(self.activation(self.transform(x)))
        return linear(x, embedding_weight if self.weight is None else self.weight, self.bias)
