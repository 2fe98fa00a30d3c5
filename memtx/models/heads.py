"""Heads that score a text or each of its tokens, and the model of a task: a backbone with a head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.models.encoder import Encoder, EncoderOutput, init_normal
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.xlnet import XLNet
from memtx.ops.cpu.linear import Linear
from memtx.state import MemoryState


class Pooling(nn.Module, ABC):
    """Maps the hidden states of a text to one vector."""

    @abstractmethod
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``(batch, dim)`` for x ``(batch, length, dim)``; mask: ``(batch, length)``, 0 for padding, else 1."""


class CLSPooling(Pooling):
    """The first token's hidden state after a linear layer and an activation (BERT, Devlin et al. 2019).

    Args:
        dim: Width of the hidden states.
        activation: Factory of the activation. Defaults to tanh.
    """

    def __init__(self, dim: int, activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.activation = activation()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``(batch, dim)``."""
        return cast(Tensor, self.activation(self.dense(x[:, 0])))


class LastPooling(CLSPooling):
    """The last token that is no padding, linear, activation (XLNet, Yang et al. 2019); arguments as in the base."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``(batch, dim)``."""
        positions = torch.arange(x.shape[1], device=x.device)
        last = ((attention_mask > 0) * positions).amax(1)
        return super().forward(x[torch.arange(len(x), device=x.device), last, None], attention_mask)


class MeanPooling(Pooling):
    """The mean over tokens, which a model trained from scratch on few texts learns fastest."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``(batch, dim)``."""
        weight = attention_mask.to(x.dtype)[..., None]
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class SequenceClassificationHead(nn.Module):
    """Scores a text, or the relation of two texts.

    Args:
        dim: Width of the hidden states.
        num_labels: Number of labels.
        pooling: Factory of the pooling, given dim.
        dropout: Dropout rate of the pooled vector.
    """

    def __init__(
        self, dim: int, num_labels: int, pooling: Callable[[int], Pooling] = MeanPooling, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pooling = pooling(dim)
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, num_labels)
        init_normal(self.out)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(batch, num_labels)`` for x ``(batch, length, dim)``."""
        return self.out(self.dropout(self.pooling(x, attention_mask)))


class EmbeddingHead(nn.Module):
    """Maps a text to a vector, whose direction stands for its meaning (Reimers and Gurevych 2019).

    Args:
        dim: Width of the hidden states.
        num_labels: Ignored.
        pooling: Factory of the pooling, given dim.
        embedding_dim: Width of the vectors, after a linear map. None for ``dim``, without the map.
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        pooling: Callable[[int], Pooling] = MeanPooling,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.pooling = pooling(dim)
        self.out = None if embedding_dim is None else Linear(dim, embedding_dim)
        if self.out is not None:
            init_normal(self.out)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return vectors ``(batch, embedding_dim)`` for x ``(batch, length, dim)``."""
        pooled = self.pooling(x, attention_mask)
        return cast(Tensor, pooled if self.out is None else self.out(pooled))


class TokenClassificationHead(nn.Module):
    """Scores every token: its tag, or whether an answer starts or ends there.

    Args:
        dim: Width of the hidden states.
        num_labels: Number of scores per token.
        dropout: Dropout rate of the hidden states.
    """

    def __init__(self, dim: int, num_labels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = Linear(dim, num_labels)
        init_normal(self.out)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(batch, length, num_labels)`` for x ``(batch, length, dim)``."""
        return self.out(self.dropout(x))


class FeedForwardTokenHead(TokenClassificationHead):
    """Scores every token after one more feed-forward part, as Big Bird finds answers.

    Args:
        dim: Width of the hidden states.
        num_labels: Number of scores per token.
        inner_dim: Width inside the feed-forward part.
        activation: Factory of its activation.
        eps: Epsilon of its layer norm.
        dropout: Dropout rate of the hidden states and of the feed-forward part.
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        inner_dim: int,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(dim, num_labels, dropout)
        self.intermediate, self.activation = Linear(dim, inner_dim), activation()
        self.output, self.norm = Linear(inner_dim, dim), nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits ``(batch, length, num_labels)`` for x ``(batch, length, dim)``."""
        hidden = self.output(self.activation(self.intermediate(self.dropout(x))))
        return self.out(self.norm(self.dropout(hidden) + x))


class MemoryTransformerBackbone(nn.Module):
    """A memory transformer that reads a whole text segment by segment, as the backbone of a head.

    In training each segment is recomputed in the backward pass, so that only states and the last layer's output grow
    with the text.

    Args:
        vocab_size: Number of token ids.
        model: Factory of the memory transformer, given vocab_size.
        segment_length: Tokens per call.
        retrospective: If True, read every text twice and return the outputs of the second time, which continues in the
            state that the first one leaves, without gradient (the retrospective feed of ERNIE-Doc, Ding et al. 2021,
            section 3.2). With ``ErnieDocMemory`` this state is the layers' outputs, so every token knows of the whole
            text.
    """

    supports_global_attention = False
    type_vocab_size = 0

    def __init__(
        self,
        vocab_size: int,
        model: Callable[[int], MemoryTransformer] = MemoryTransformer,
        segment_length: int = 256,
        retrospective: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, segment_length=segment_length)
        self.retrospective = retrospective
        self.model = model(vocab_size)
        self.dim, self.vocab_size, self.segment_length = self.model.dim, vocab_size, segment_length

    def encode(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Return normalized hidden states ``(batch, length, dim)`` of tokens ``(batch, length)``, padded at the end."""
        state = self._skim(tokens, attention_mask) if self.retrospective else self.model.init_state(tokens.shape[0])
        outputs = []

        def read(segment: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
            out = self.model(segment, state, return_hidden_states=True)
            return self.model.norm(out.hidden_states[-1]), out.state

        recompute = torch.is_grad_enabled() and tokens.shape[1] > self.segment_length
        for start in range(0, tokens.shape[1], self.segment_length):
            segment = tokens[:, start : start + self.segment_length]
            output = checkpoint(read, segment, state, use_reentrant=False) if recompute else read(segment, state)
            x, state = cast(tuple[Tensor, MemoryState], output)
            outputs.append(x)
        return torch.cat(outputs, dim=1)

    @torch.no_grad()
    def _skim(self, tokens: Tensor, attention_mask: Tensor) -> MemoryState:
        """Return the state after the texts, the skimming phase; padding goes before them, as another document."""
        length, text_length = tokens.shape[1], attention_mask.sum(1, keepdim=True)
        offset = torch.arange(length, device=tokens.device)
        tokens = tokens.gather(1, (offset + text_length) % length)
        document_starts = offset == length - text_length
        state = self.model.init_state(tokens.shape[0])
        for start in range(0, length, self.segment_length):
            segment = slice(start, start + self.segment_length)
            state = self.model(tokens[:, segment], state, document_starts=document_starts[:, segment]).state
        return state


class TaskModel(PretrainedModel):
    """A backbone that reads texts and a head that scores them.

    Args:
        vocab_size: Number of token ids.
        num_labels: Number of scores per text or token.
        backbone: Factory of the backbone, given vocab_size: ``Encoder``, ``XLNet`` or ``MemoryTransformerBackbone``.
        head: Factory of the head, given dim and num_labels: ``SequenceClassificationHead`` or
            ``TokenClassificationHead``.

    Raises:
        MemtxError: A number is out of range, or the backbone is of another class.
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
        module = backbone(vocab_size)
        if not isinstance(module, Encoder | MemoryTransformerBackbone | XLNet):
            name = type(module).__name__
            message = f"The backbone is a {name}, expected an Encoder, XLNet or MemoryTransformerBackbone."
            raise MemtxError(message, "Change backbone.")
        if isinstance(module, Encoder):
            # No task uses them, so they would have no gradient.
            module.head = module.pooler = None
        if isinstance(module, XLNet):
            module.head = None
            module.mask_embedding.requires_grad_(False)
        self.backbone = module
        self.vocab_size, self.num_labels = vocab_size, num_labels
        self.head = head(module.dim, num_labels)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits, ``(batch, num_labels)`` or ``(batch, length, num_labels)``.

        Args:
            tokens: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding.
            token_type_ids: ``(batch, length)``, 1 for tokens of a second text; ignored by a backbone without types.
            global_attention_mask: ``(batch, length)``, 1 for global tokens; ignored by a backbone without them.
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
        """Return hidden states and logits; arguments as in :meth:`forward`.

        If ``return_hidden_states`` is True, the hidden states of an ``Encoder`` are the outputs of the embedding and of
        every layer, each ``(batch, length, dim)``; other backbones return none.
        """
        hidden: tuple[Tensor, ...] = ()
        if isinstance(self.backbone, MemoryTransformerBackbone):
            x = self.backbone.encode(tokens, attention_mask)
        elif isinstance(self.backbone, XLNet):
            x = self.backbone(tokens, attention_mask, token_type_ids).last_hidden_state
        else:
            masks = (attention_mask, token_type_ids, global_attention_mask)
            out = run_encoder(self.backbone, tokens, *masks, return_hidden_states=return_hidden_states)
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
    """Return an encoder's output for a task's batch, without the arguments that it does not support."""
    if encoder.type_vocab_size <= 1:
        token_type_ids = None
    if global_attention_mask is not None and not (encoder.supports_global_attention and global_attention_mask.any()):
        global_attention_mask = None
    output = encoder(
        tokens, attention_mask, token_type_ids, global_attention_mask, output_hidden_states=return_hidden_states
    )
    return cast(EncoderOutput, output)
