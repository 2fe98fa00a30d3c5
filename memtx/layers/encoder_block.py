"""One layer of an encoder: attention, then feed-forward, each added to its input and normed after."""

from __future__ import annotations

from torch import Tensor, nn

from memtx.layers.encoder_attention import EncoderAttention
from memtx.layers.encoder_inputs import EncoderInputs


class EncoderBlock(nn.Module):
    """A post-norm layer (Vaswani et al. 2017, section 3.1).

    Args:
        attention: the attention part.
        feed_forward: the position-wise part.
        dim: width of the hidden states.
        eps: of the norms.
        dropout: of what each part adds.
    """

    def __init__(
        self, attention: EncoderAttention, feed_forward: nn.Module, dim: int, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, inputs: EncoderInputs) -> Tensor:
        """Return the layer's output (rows, length, dim)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, inputs)))
        out: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return out

    def project_values(self, x: Tensor) -> Tensor:
        """Return the heads' values side by side, (rows, length, dim), of the layer's input x."""
        out: Tensor = self.attention.value(x)
        return out
