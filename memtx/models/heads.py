"""What a task asks of hidden states: one answer a text, or scores for every token; and the model that they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtx.errors import MemtxError, at_least
from memtx.models import folder
from memtx.models.encoder import Encoder, EncoderOutput
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.permuted import PermutedEncoder
from memtx.ops.linear import Linear
from memtx.state import MemoryState


class Pooling(nn.Module, ABC):
    """A text's hidden states as one vector."""

    @abstractmethod
    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Return (rows, dim) of x (rows, length, dim); present: (rows, length), 1 for a token and 0 for padding."""


class FirstPooling(Pooling):
    """The first token's hidden state, through a map and a tanh (BERT, Devlin et al. 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = Linear(dim, dim)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Return (rows, dim)."""
        return torch.tanh(self.map(x[:, 0]))


class MeanPooling(Pooling):
    """The mean over tokens; what a model trained from scratch on few texts learns soonest."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Return (rows, dim)."""
        weight = present.to(x.dtype)[..., None]
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class TextHead(nn.Module):
    """Scores of a text: what it is, or how two texts stand to each other.

    Args:
        dim: width of the hidden states.
        outputs: labels.
        pooling: makes one vector of a text's hidden states, from dim.
        dropout: of that vector.
    """

    def __init__(
        self, dim: int, outputs: int, pooling: Callable[[int], Pooling] = MeanPooling, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pooling = pooling(dim)
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, outputs)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Return (rows, outputs) scores of x (rows, length, dim)."""
        out: Tensor = self.out(self.dropout(self.pooling(x, present)))
        return out


class TokenHead(nn.Module):
    """Scores of every token: its tag, or whether an answer begins or ends with it.

    Args:
        dim: width of the hidden states.
        outputs: scores a token.
        dropout: of the hidden states.
    """

    def __init__(self, dim: int, outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, outputs)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Return (rows, length, outputs) scores of x (rows, length, dim)."""
        out: Tensor = self.out(self.dropout(x))
        return out


class DocumentReader(nn.Module):
    """A memory transformer that reads a whole text segment by segment, so that heads can be put on it.

    In training each segment is read once more on the way back (as replay does): what is held does not grow with the
    text but for states and the last layer's output.

    Args:
        vocab_size: of the tokenizer.
        model: makes the memory transformer.
        segment: tokens a call.
    """

    knows_globals = False
    types = 0

    def __init__(
        self, vocab_size: int, model: Callable[[int], MemoryTransformer] = MemoryTransformer, segment: int = 256
    ) -> None:
        super().__init__()
        at_least(1, segment=segment)
        self.model = model(vocab_size)
        self.dim, self.vocab_size, self.segment = self.model.dim, vocab_size, segment

    def hidden(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Return (rows, length, dim), normed; tokens: (rows, length) int64. Padding stands at the end."""
        state = self.model.init_state(tokens.shape[0])
        parts = []

        def read(part: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
            out = self.model(part, state, return_hidden=True)
            return self.model.norm(out.hidden_states[-1]), out.state

        replayed = torch.is_grad_enabled() and tokens.shape[1] > self.segment
        for at in range(0, tokens.shape[1], self.segment):
            part = tokens[:, at : at + self.segment]
            got = checkpoint(read, part, state, use_reentrant=False) if replayed else read(part, state)
            x, state = cast(tuple[Tensor, MemoryState], got)
            parts.append(x)
        return torch.cat(parts, dim=1)


class TaskModel(folder.Kept):
    """A body that reads texts and a head that scores them.

    Args:
        vocab_size: of the tokenizer.
        outputs: scores a text or a token.
        body: makes what reads, from the size of the vocabulary: ``Encoder`` or ``DocumentReader``.
        head: makes what scores, from the width of the hidden states and outputs: ``TextHead`` or ``TokenHead``.

    Raises:
        MemtxError: numbers are out of range or the body is of no known kind.
    """

    def __init__(
        self,
        vocab_size: int,
        outputs: int,
        body: Callable[[int], nn.Module] = Encoder,
        head: Callable[[int, int], nn.Module] = TextHead,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        at_least(1, vocab_size=vocab_size, outputs=outputs)
        self.remember(arguments)
        made = body(vocab_size)
        if not isinstance(made, Encoder | DocumentReader | PermutedEncoder):
            raise MemtxError(
                f"The body is a {type(made).__name__}, expected an Encoder, a PermutedEncoder or a DocumentReader.",
                "Change body.",
            )
        if isinstance(made, Encoder):
            # Made for other ends: no task asks them, and no gradient would reach them.
            made.head = made.pooler = None
        self.body = made
        self.vocab_size, self.outputs = vocab_size, outputs
        self.head = head(made.dim, outputs)

    def forward(
        self, tokens: Tensor, present: Tensor, types: Tensor | None = None, marked: Tensor | None = None
    ) -> Tensor:
        """Return scores, (rows, outputs) or (rows, length, outputs).

        Args:
            tokens: (rows, length) int64.
            present: (rows, length), 1 for a token and 0 for padding.
            types: (rows, length), 1 for tokens of a second text; of no meaning to a body that tells none apart.
            marked: (rows, length), 1 for global tokens; likewise.
        """
        return self.layers_and_scores(tokens, present, types, marked)[1]

    def layers_and_scores(
        self,
        tokens: Tensor,
        present: Tensor,
        types: Tensor | None = None,
        marked: Tensor | None = None,
        *,
        keep: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return hidden states and scores.

        Args:
            tokens: as are the others, what :meth:`forward` takes.
            present: likewise.
            types: likewise.
            marked: likewise.
            keep: whether hidden states are wanted: the embedding's output and every layer's, each (rows, length, dim);
                empty otherwise, and of a body that is no ``Encoder``.
        """
        hidden: tuple[Tensor, ...] = ()
        if isinstance(self.body, DocumentReader):
            x = self.body.hidden(tokens, present)
        elif isinstance(self.body, PermutedEncoder):
            x = self.body(tokens, present).last_hidden_state
        else:
            out = read_whole(self.body, tokens, present, types, marked, keep=keep)
            x, hidden = out.last_hidden_state, out.hidden_states or ()
        return hidden, self.head(x, present)


def read_whole(
    body: Encoder, tokens: Tensor, present: Tensor, types: Tensor | None, marked: Tensor | None, *, keep: bool = False
) -> EncoderOutput:
    """Return what an encoder makes of a task's rows; what it does not know of is left out."""
    return cast(
        EncoderOutput,
        body(
            tokens,
            present,
            types if body.types > 1 else None,
            marked if body.knows_globals and marked is not None and bool(marked.any()) else None,
            output_hidden_states=keep,
        ),
    )
