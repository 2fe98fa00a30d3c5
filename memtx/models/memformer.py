"""Memformer (Wu et al. 2020): an encoder-decoder of segments with a memory of slots.

The encoder reads a segment and the slots, the decoder predicts the next segment from the encoder's output, and the
slots are written once a segment from that output. So a call encodes the segment before it, whose tokens are in the
state beside the slots, and decodes its own: with replay in training, nothing else is stored between segments (memory
replay back-propagation, section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import check_at_least, check_divisible, check_positive
from memtx.layers.cross_attention import DecoderBlock
from memtx.layers.lm_head import AdaptiveEmbedding, AdaptiveSoftmax, VocabClusters
from memtx.memory.parts import merge_heads, split_heads
from memtx.models.encoder import init_normal
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.validation import check_segment, check_token_ids
from memtx.ops.cpu.linear import Linear
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.segment import Segment
from memtx.state import MemoryState, state_dataclass


@state_dataclass
class MemformerState:
    """The slots, and the newest segment of the open document, which they do not hold yet.

    Attributes:
        slots: ``(batch, num_slots, dim)``, each of length 1; zeros before the first write.
        is_written: ``(batch,)`` bool, True after the first write.
        tokens: ``(batch, segment_length)`` int64, zeros after the segment's end.
        length: ``(batch,)`` int64, number of its tokens.
    """

    slots: Tensor
    is_written: Tensor
    tokens: Tensor
    length: Tensor


class SlotAttention(nn.Module):
    """The write to the slots: memory slot attention and biased memory normalization (section 3.4).

    A slot attends to itself and the segment, never to other slots: m'_i = softmax(q_i [k_i; K_x] / tau) [m_i; V_x].
    Then m_i = (m'_i + b_i) / ||m'_i + b_i||: what is not written again fades to the bias b_i, with which a slot begins.

    Args:
        dim: Width of the slots and the hidden states.
        num_slots: Number of slots.
        heads: Number of heads.
        temperature: tau; below 1, a slot takes few tokens.
    """

    def __init__(self, dim: int, num_slots: int, heads: int, temperature: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5 / temperature
        self.query, self.key, self.value = (Linear(dim, dim, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(num_slots, dim))

    def initial_slots(self) -> Tensor:
        """Return the slots that nothing is written to, ``(num_slots, dim)``."""
        return F.normalize(self.bias, dim=-1)

    def forward(self, slots: Tensor, x: Tensor, is_token: Tensor) -> Tensor:
        """Return the slots ``(batch, num_slots, dim)`` after the tokens x ``(batch, length, dim)`` that exist."""
        q, own_key, own_value = (split_heads(part, self.heads) for part in (self.query(slots), self.key(slots), slots))
        k, v = split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)
        scores = (q @ k.mT).masked_fill(~is_token[:, None, None], float("-inf"))
        scores = torch.cat([(q * own_key).sum(-1, keepdim=True), scores], dim=-1) * self.scale
        weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1).to(v.dtype)
        attended = merge_heads(weights[..., :1] * own_value + weights[..., 1:] @ v)
        return F.normalize(attended + self.bias, dim=-1)


class Memformer(PretrainedModel):
    """A recurrent language model of segments.

    Args:
        vocab_size: Number of token ids, frequent tokens first.
        dim: Width of the hidden states and the slots.
        encoder_depth: Layers of the encoder, each of self-attention, attention to the slots and a feed-forward part.
        decoder_depth: Layers of the decoder, which attend to the encoder's output in place of the slots.
        heads: Heads of all attentions.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        num_slots: Number of slots.
        segment_length: Tokens of a segment at most; longer calls are read segment by segment.
        temperature: Temperature of the writing attention.
        cutoffs: First token of each further cluster of the vocabulary, for an adaptive softmax.
        activation: Factory of the feed-forward activation.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings and the residual branches.
        attention_dropout: Dropout rate of the attention weights.
        pre_norm: If True, normalize before each part instead of after it.

    Raises:
        MemtxError: A number is out of range, or dim is not divisible by heads.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        encoder_depth: int = 3,
        decoder_depth: int = 6,
        heads: int = 4,
        hidden_dim: int | None = None,
        num_slots: int = 32,
        segment_length: int = 512,
        temperature: float = 0.25,
        cutoffs: Sequence[int] = (),
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        pre_norm: bool = False,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        check_at_least(1, heads=heads, num_slots=num_slots, segment_length=segment_length)
        check_positive(temperature=temperature)
        check_divisible(dim=dim, heads=heads)
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.num_slots, self.segment_length = vocab_size, dim, num_slots, segment_length
        self.embedding = AdaptiveEmbedding(VocabClusters(vocab_size, cutoffs, dim, 1), dim)
        self.encoder_positions, self.decoder_positions = (nn.Embedding(segment_length, dim) for _ in range(2))

        def blocks(depth: int) -> nn.ModuleList:
            options = (dim, heads, hidden_dim, activation, eps, dropout, attention_dropout, True, pre_norm)
            return nn.ModuleList(DecoderBlock(*options) for _ in range(depth))

        def final_norm() -> nn.Module:
            return nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()

        self.encoder, self.decoder = blocks(encoder_depth), blocks(decoder_depth)
        self.encoder_norm, self.decoder_norm = final_norm(), final_norm()
        self.slot_attention = SlotAttention(dim, num_slots, heads, temperature)
        self.dropout = nn.Dropout(dropout)
        init_normal(self)
        self.head = AdaptiveSoftmax(self.embedding)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` fresh streams; dtype and device default to the weights'."""
        check_at_least(1, batch_size=batch_size)
        weight = self.slot_attention.bias
        slots = torch.zeros(
            batch_size, self.num_slots, self.dim, dtype=dtype or weight.dtype, device=device or weight.device
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=slots.device)
        tokens = position[:, None].expand(-1, self.segment_length).clone()
        return MemoryState(position, ((MemformerState(slots, position.bool(), tokens, position.clone()),),))

    def forward(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read segments, as :meth:`memtx.MemoryTransformer.forward` does; a call ends a segment.

        With ``return_hidden_states``, the last hidden states alone are returned, ``(batch, length, dim)``.
        """
        check_token_ids("tokens", tokens)
        check_segment(tokens.shape[0], tokens.shape[1], state, document_starts=document_starts, labels=labels)
        state = self.init_state(len(tokens)) if state is None else state
        hidden = []
        for start in range(0, tokens.shape[1], self.segment_length):
            part = slice(start, start + self.segment_length)
            part_starts = None if document_starts is None else document_starts[:, part]
            output, state = self._read_segment(tokens[:, part], state, part_starts)
            hidden.append(output)
        x = torch.cat(hidden, dim=1)
        hidden_states = (x,) if return_hidden_states else None
        if labels is None:
            return MemoryOutput(self.head(x), hidden_states, state, None, None, None, {})
        nll_sum, nll = self.head.nll(x.flatten(0, 1), labels.reshape(-1))
        loss = nll_sum / (labels != IGNORE_INDEX).sum().clamp(min=1)
        return MemoryOutput(None, hidden_states, state, loss, loss, nll.view_as(labels), {})

    def encode(self, tokens: Tensor, is_token: Tensor, slots: Tensor) -> Tensor:
        """Return the encoder's output, ``(batch, length, dim)``.

        Args:
            tokens: ``(batch, length)`` int64.
            is_token: ``(batch, length)`` bool, False for padding.
            slots: ``(batch, num_slots, dim)``.
        """
        x = self.dropout(self.embedding(tokens) + self.encoder_positions.weight[: tokens.shape[1]])
        mask = is_token[:, None, None]
        for block in cast(list[DecoderBlock], list(self.encoder)):
            x, _ = block(x, None, block.cross_attention.project(slots), None, mask)
        return cast(Tensor, self.encoder_norm(x))

    def _read_segment(
        self, tokens: Tensor, state: MemoryState, document_starts: Tensor | None
    ) -> tuple[Tensor, MemoryState]:
        """Return the decoder's output ``(batch, length, dim)`` for a segment, and the next state."""
        past: MemformerState = state.layers[0][0]
        length, device = tokens.shape[1], tokens.device
        is_token = torch.arange(self.segment_length, device=device) < past.length[:, None]
        initial = self.slot_attention.initial_slots()
        slots = torch.where(past.is_written[:, None, None], past.slots.to(initial.dtype), initial)
        encoded = self.encode(past.tokens, is_token, slots)
        has_tokens = past.length > 0
        slots = torch.where(has_tokens[:, None, None], self.slot_attention(slots, encoded, is_token), slots)
        segment = Segment.from_document_starts(state.position, length, document_starts)
        document, mask, source_mask = segment.document_id, None, is_token[:, None, None]
        if document_starts is not None:
            is_same = document[:, :, None] == document[:, None]
            mask = (is_same & torch.ones_like(is_same[0]).tril())[:, None]
            # What is encoded belongs to the document that the segment begins in.
            source_mask = source_mask & (document == 0)[:, None, :, None]
        x = self.dropout(self.embedding(tokens) + self.decoder_positions.weight[:length])
        for block in cast(list[DecoderBlock], list(self.decoder)):
            x, _ = block(x, None, block.cross_attention.project(encoded), source_mask, mask)
        next_tokens, next_length = tokens, torch.full_like(past.length, length)
        is_written = past.is_written | has_tokens
        if document_starts is not None:
            # The newest document's tokens are the last ones of the segment.
            next_length = (document == document[:, -1:]).sum(1)
            index = torch.arange(length, device=device) + length - next_length[:, None]
            next_tokens = tokens.gather(1, index.clamp(max=length - 1)).masked_fill(index >= length, 0)
            is_written = is_written & (document[:, -1] == 0)
        next_slots = slots.masked_fill(~is_written[:, None, None], 0.0).to(past.slots.dtype)
        next_tokens = F.pad(next_tokens, (0, self.segment_length - length))
        next_state = MemformerState(next_slots, is_written, next_tokens, next_length)
        return cast(Tensor, self.decoder_norm(x)), MemoryState(segment.next_position, ((next_state,),))
