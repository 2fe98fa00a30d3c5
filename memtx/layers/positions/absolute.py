"""Learned absolute positions of a decoder, added to its embeddings (GPT-2, Radford et al. 2019, section 2.3)."""

from __future__ import annotations

from torch import Tensor, nn

from memtx.errors import check_at_least


class LearnedPositions(nn.Module):
    """A vector for each of the first ``num_positions`` positions of a document.

    A stream goes on past the last one by going through the upper half of the table again and again: the beginning's
    vectors, which mark what nothing stands before, do not come back, and the newest half table of tokens keeps its
    order but for the place where the half begins anew. No model was trained on that, so what it is worth is to be
    measured, and the window should be half the table at most for texts that are longer.

    Args:
        dim: width of the hidden states.
        num_positions: positions.

    Raises:
        MemtxError: num_positions is below 2.
    """

    def __init__(self, dim: int, num_positions: int) -> None:
        super().__init__()
        check_at_least(2, num_positions=num_positions)
        self.num_positions = num_positions
        self.table = nn.Embedding(num_positions, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, position: Tensor) -> Tensor:
        """Return (..., dim) for positions (...) int64 within their documents, however far."""
        half = self.num_positions - self.num_positions // 2
        past = half + (position - half) % (self.num_positions // 2)
        out: Tensor = self.table(position.where(position < self.num_positions, past))
        return out
