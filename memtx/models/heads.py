"""What a task asks of hidden states: one answer a text, or scores for every token; and the model that they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtx.checkpoint import pretrained
from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder import Encoder, EncoderOutput
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.xlnet import XLNet
from memtx.ops.cpu.linear import Linear
from memtx.state import MemoryState


class Pooling(nn.Module, ABC):
    """A text's hidden states as one vector."""

    @abstractmethod
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, dim) of x (rows, length, dim); attention_mask: (rows, length), 1 for a token, 0 for padding."""


class CLSPooling(Pooling):
    """The first token's hidden state, through a map and a tanh (BERT, Devlin et al. 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, dim)."""
        return torch.tanh(self.dense(x[:, 0]))


class MeanPooling(Pooling):
    """The mean over tokens; what a model trained from scratch on few texts learns soonest."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, dim)."""
        weight = attention_mask.to(x.dtype)[..., None]
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class SequenceClassificationHead(nn.Module):
    """Scores of a text: what it is, or how two texts stand to each other.

    Args:
        dim: width of the hidden states.
        num_labels: labels.
        pooling: makes one vector of a text's hidden states, from dim.
        dropout: of that vector.
    """

    def __init__(
        self, dim: int, num_labels: int, pooling: Callable[[int], Pooling] = MeanPooling, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pooling = pooling(dim)
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, num_labels)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, num_labels) scores of x (rows, length, dim)."""
        out: Tensor = self.out(self.dropout(self.pooling(x, attention_mask)))
        return out


class TokenClassificationHead(nn.Module):
    """Scores of every token: its tag, or whether an answer begins or ends with it.

    Args:
        dim: width of the hidden states.
        num_labels: scores a token.
        dropout: of the hidden states.
    """

    def __init__(self, dim: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, num_labels)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, length, num_labels) scores of x (rows, length, dim)."""
        out: Tensor = self.out(self.dropout(x))
        return out


class MemoryTransformerBackbone(nn.Module):
    """A memory transformer that reads a whole text segment by segment, so that heads can be put on it.

    In training each segment is read once more on the way back (as replay does): what is held does not grow with the
    text but for states and the last layer's output.

    Args:
        vocab_size: of the tokenizer.
        model: makes the memory transformer.
        segment_length: tokens a call.
    """

    supports_global_attention = False
    type_vocab_size = 0

    def __init__(
        self, vocab_size: int, model: Callable[[int], MemoryTransformer] = MemoryTransformer, segment_length: int = 256
    ) -> None:
        super().__init__()
        check_at_least(1, segment_length=segment_length)
        self.model = model(vocab_size)
        self.dim, self.vocab_size, self.segment_length = self.model.dim, vocab_size, segment_length

    def encode(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (rows, length, dim), normed; tokens: (rows, length) int64. Padding stands at the end."""
        state = self.model.init_state(tokens.shape[0])
        parts = []

        def read(part: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
            out = self.model(part, state, return_hidden_states=True)
            return self.model.norm(out.hidden_states[-1]), out.state

        replayed = torch.is_grad_enabled() and tokens.shape[1] > self.segment_length
        for at in range(0, tokens.shape[1], self.segment_length):
            part = tokens[:, at : at + self.segment_length]
            got = checkpoint(read, part, state, use_reentrant=False) if replayed else read(part, state)
            x, state = cast(tuple[Tensor, MemoryState], got)
            parts.append(x)
        return torch.cat(parts, dim=1)


class TaskModel(pretrained.PretrainedModel):
    """A body that reads texts and a head that scores them.

    Args:
        vocab_size: of the tokenizer.
        num_labels: scores a text or a token.
        backbone: makes what reads, from the size of the vocabulary: ``Encoder`` or ``MemoryTransformerBackbone``.
        head: makes what scores, from the width of the hidden states and num_labels: ``SequenceClassificationHead`` or
            ``TokenClassificationHead``.

    Raises:
        MemtxError: numbers are out of range or the body is of no known kind.
    """

    def __init__(
        self,
        vocab_size: int,
        num_labels: int,
        backbone: Callable[[int], nn.Module] = Encoder,
        head: Callable[[int, int], nn.Module] = SequenceClassificationHead,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, num_labels=num_labels)
        self.save_init_args(arguments)
        made = backbone(vocab_size)
        if not isinstance(made, Encoder | MemoryTransformerBackbone | XLNet):
            raise MemtxError(
                f"The backbone is a {type(made).__name__}, "
                "expected an Encoder, an XLNet or a MemoryTransformerBackbone.",
                "Change backbone.",
            )
        if isinstance(made, Encoder):
            # Made for other ends: no task asks them, and no gradient would reach them.
            made.head = made.pooler = None
        self.backbone = made
        self.vocab_size, self.num_labels = vocab_size, num_labels
        self.head = head(made.dim, num_labels)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return scores, (rows, num_labels) or (rows, length, num_labels).

        Args:
            tokens: (rows, length) int64.
            attention_mask: (rows, length), 1 for a token and 0 for padding.
            token_type_ids: (rows, length), 1 for tokens of a second text; of no meaning to a body that tells none
                apart.
            global_attention_mask: (rows, length), 1 for global tokens; likewise.
        """
        return self.forward_with_hidden_states(tokens, attention_mask, token_type_ids, global_attention_mask)[1]

    def forward_with_hidden_states(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        return_hidden_states: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return hidden states and scores.

        Args:
            tokens: as are the others, what :meth:`forward` takes.
            attention_mask: likewise.
            token_type_ids: likewise.
            global_attention_mask: likewise.
            return_hidden_states: whether hidden states are wanted: the embedding's output and every layer's, each
                (rows, length, dim); empty otherwise, and of a body that is no ``Encoder``.
        """
        hidden: tuple[Tensor, ...] = ()
        if isinstance(self.backbone, MemoryTransformerBackbone):
            x = self.backbone.encode(tokens, attention_mask)
        elif isinstance(self.backbone, XLNet):
            x = self.backbone(tokens, attention_mask).last_hidden_state
        else:
            out = run_encoder(
                self.backbone,
                tokens,
                attention_mask,
                token_type_ids,
                global_attention_mask,
                return_hidden_states=return_hidden_states,
            )
            x, hidden = out.last_hidden_state, out.hidden_states or ()
        return hidden, self.head(x, attention_mask)


def run_encoder(
    encoder: Encoder,
    tokens: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None,
    global_attention_mask: Tensor | None,
    *,
    return_hidden_states: bool = False,
) -> EncoderOutput:
    """Return what an encoder makes of a task's rows; what it does not know of is left out."""
    return cast(
        EncoderOutput,
        encoder(
            tokens,
            attention_mask,
            token_type_ids if encoder.type_vocab_size > 1 else None,
            global_attention_mask
            if encoder.supports_global_attention
            and global_attention_mask is not None
            and bool(global_attention_mask.any())
            else None,
            output_hidden_states=return_hidden_states,
        ),
    )
