"""Token shift: of each channel, a learned share of the token before takes the place of the token's own.

As in RWKV (Peng et al. 2023, section 3.1). What is stored of a token can then say at once what came before it, which a
memory's own projections of single tokens cannot: "this value came after that key".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.segment import Segment


class TokenShift(nn.Module):
    """The mix of each token with the one before it in its document.

    Args:
        dim: width of the hidden states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # From channels that keep their own to channels that take all of the token before.
        self.mix_ratio = nn.Parameter(torch.linspace(0.0, 1.0, dim))

    def forward(self, x: Tensor, last_input: Tensor, segment: Segment) -> Tensor:
        """Mix (rows, segment, dim).

        Args:
            x: the tokens' inputs.
            last_input: (rows, dim), the input before the segment's first; not looked at where a document begins.
            segment: where the tokens stand; before a document's first there is zero.
        """
        before = torch.cat([last_input[:, None].to(x.dtype), x[:, :-1]], dim=1)
        before = before.masked_fill((segment.position == 0)[..., None], 0.0)
        return torch.lerp(x, before, self.mix_ratio.to(x.dtype))

    @staticmethod
    def last_input(x: Tensor) -> Tensor:
        """Return what the next segment needs, (rows, dim); copied, for a view would keep the whole segment alive."""
        return x[:, -1].clone()
