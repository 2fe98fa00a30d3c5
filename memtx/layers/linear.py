"""``nn.Linear`` by the faster way of the processor."""

from __future__ import annotations

from torch import Tensor, nn

from memtx.ops.linear import linear


class Linear(nn.Linear):
    """A linear map whose products :func:`memtx.ops.linear.linear` makes; in everything else ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)
