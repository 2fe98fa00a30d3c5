"""XLNet (Yang et al. 2019): an encoder pretrained to predict tokens in permuted orders, and bidirectional in use.

As in Transformer-XL, its layers also see hidden states of previous segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least
from memtx.layers.xlnet import StreamInputs, TwoStreamAttention, TwoStreamBlock, relative_sinusoids
from memtx.memory.recurrent import RecurrentState
from memtx.models.encoder import EncoderOutput, init_normal
from memtx.models.validation import check_segment, check_token_ids
from memtx.ops.cpu.linear import linear
from memtx.segment import Segment
from memtx.state import MemoryState


@dataclass(frozen=True)
class XLNetOutput(EncoderOutput):
    """Output of one call.

    Attributes:
        last_hidden_state: ``(batch, length, dim)``, or ``(batch, num_targets, dim)`` with a target mapping.
        hidden_states: If requested, the content stream after the embedding and after every layer.
        logits: As ``last_hidden_state``, with the vocabulary in place of dim; None without a head.
        state: State for the next call.
    """

    state: MemoryState | None = None


class PredictionHead(nn.Module):
    """Logits by the token embeddings and a bias; ``weight`` is None if the embeddings are shared."""

    def __init__(self, vocab_size: int, dim: int, *, tie_weights: bool) -> None:
        super().__init__()
        self.weight = None if tie_weights else nn.Parameter(torch.empty(vocab_size, dim).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding_weight: Tensor) -> Tensor:
        """Return logits ``(..., vocab)`` for x ``(..., dim)``."""
        return linear(x, embedding_weight if self.weight is None else self.weight, self.bias)


class XLNet(PretrainedModel):
    """A post-norm encoder with two streams in pretraining and one in use, and a memory of hidden states.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the hidden states, even.
        depth: Number of layers.
        heads: Heads per layer.
        hidden_dim: Hidden width of the feed-forward parts. Defaults to 4 dim.
        eps: Epsilon of the norms.
        dropout: Dropout rate of the embeddings, the attention weights and the residual branches.
        memory_length: Hidden states carried per layer, the newest; None carries all, in a state that grows.
        reuse_length: Tokens of a call, the first ones, whose hidden states are carried: the next call begins after
            them. None for all.
        causal: If True, a token sees no later one.
        same_length: If True, a token of a causal model sees as many keys as any other of the call.
        clamp_length: Largest distance that is told apart; 0 or less for no limit.
        bi_data: If True, the second half of every batch holds texts read backward, so its distances are negated.
        activation: Factory of the feed-forward activation.
        add_lm_head: If True, add a head that predicts tokens.
        tie_embeddings: If True, its weights are the token embeddings.

    Raises:
        MemtxError: A number is out of range or not divisible as required.
    """

    supports_global_attention = False
    type_vocab_size = 3

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        hidden_dim: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
        memory_length: int | None = 0,
        reuse_length: int | None = None,
        causal: bool = False,
        same_length: bool = False,
        clamp_length: int = -1,
        bi_data: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
        add_lm_head: bool = True,
        tie_embeddings: bool = True,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads, reuse_length=reuse_length or 1)
        check_at_least(0, memory_length=memory_length or 0)
        if dim % 2 or dim % heads:
            message = f"dim ({dim}) must be even and divisible by heads ({heads})."
            raise MemtxError(message, "Choose another dim or heads.")
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.memory_length, self.reuse_length = memory_length, reuse_length
        self.causal, self.same_length, self.clamp_length, self.bi_data = causal, same_length, clamp_length, bi_data
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mask_embedding = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(
            TwoStreamBlock(dim, heads, hidden_dim, eps, dropout, activation) for _ in range(depth)
        )
        self.head = PredictionHead(vocab_size, dim, tie_weights=tie_embeddings) if add_lm_head else None
        self.dropout, self.output_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        init_normal(self)
        nn.init.normal_(self.mask_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, TwoStreamAttention):
                for parameter in module.parameters(recurse=False):
                    nn.init.normal_(parameter, std=0.02)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` fresh streams; dtype and device default to the weights'."""
        check_at_least(1, batch_size=batch_size)
        weight = self.embedding.weight
        hidden = torch.zeros(
            batch_size, self.memory_length or 0, self.dim, dtype=dtype or weight.dtype, device=device or weight.device
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=hidden.device)
        return MemoryState(position, ((RecurrentState(hidden),),) * self.depth)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        state: MemoryState | None = None,
        document_starts: Tensor | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> XLNetOutput:
        """Encode texts, or predict some of their tokens.

        Args:
            input_ids: ``(batch, length)`` int64.
            attention_mask: ``(batch, length)``, 1 for a token and 0 for padding; None for no padding.
            token_type_ids: Segment of text of each token, ``(batch, length)`` int64; those carried count as segment 0.
                None does not score segments.
            state: State after the previous call; None for fresh streams.
            document_starts: ``(batch, length)`` bool, True where a document begins, which sees nothing before it.
            perm_mask: ``(batch, length, length)``, 1 where a token (second dimension) does not see another (third).
                None for full attention. In the content stream, every token sees itself.
            target_mapping: ``(batch, num_targets, length)``, 1 at the position of each target, 0 elsewhere; a row of
                zeros is no target, and its output has no meaning. The output is then that of the query stream.
            output_hidden_states: If True, return the content stream's hidden states.

        Raises:
            MemtxError: Shapes do not fit each other, or a target has several positions.
        """
        per_token = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        check_token_ids("input_ids", input_ids, **per_token)
        (batch_size, length), device = input_ids.shape, input_ids.device
        check_segment(batch_size, length, state, document_starts=document_starts)
        self._check_batch(batch_size, length, state, perm_mask, target_mapping)
        memories = [None] * self.depth if state is None else [layer[0].hidden for layer in state.layers]
        num_cached = 0 if memories[0] is None else memories[0].shape[1]
        content = self.dropout(self.embedding(input_ids))
        hidden_states = [content]
        shared, hidden = self._stream_inputs(
            content, num_cached, state, attention_mask, token_type_ids, document_starts, perm_mask
        )
        query = query_inputs = None
        if target_mapping is not None:
            positions = target_mapping.argmax(-1)
            query_inputs = shared.at(positions, hidden)
            query = self.dropout(self.mask_embedding.expand(batch_size, positions.shape[1], -1))
        if hidden is not None:
            itself = F.pad(torch.eye(length, dtype=torch.bool, device=device), (num_cached, 0))
            hidden = hidden & ~itself
        content_inputs = StreamInputs(shared.sinusoids, hidden, shared.absent, shared.is_other_segment)
        next_memories = []
        for layer, (block, memory) in enumerate(zip(self._layers(), memories, strict=True)):
            next_memories.append(self._next_memory(memory, content))
            keys = content if memory is None else torch.cat([memory.to(content.dtype), content], dim=1)
            keys_values = block.attention.project(keys)
            if query is not None and query_inputs is not None:
                query = block(query, keys_values, query_inputs)
            if query is None or output_hidden_states or layer + 1 < self.depth:
                content = block(content, keys_values, content_inputs)
                hidden_states.append(content)
        output = self.output_dropout(content if query is None else query)
        return XLNetOutput(
            output,
            tuple(hidden_states) if output_hidden_states else None,
            None if self.head is None else self.head(output, self.embedding.weight),
            state=MemoryState(self._next_position(input_ids, state, document_starts), tuple(next_memories)),
        )

    def _check_batch(
        self,
        batch_size: int,
        length: int,
        state: MemoryState | None,
        perm_mask: Tensor | None,
        target_mapping: Tensor | None,
    ) -> None:
        if state is not None and len(state.layers) != self.depth:
            message = f"The state has {len(state.layers)} layers, the model {self.depth}."
            raise MemtxError(message, "Give a state of this model.")
        if self.bi_data and batch_size % 2:
            message = f"The batch has {batch_size} texts, but with bi_data its second half is read backward."
            raise MemtxError(message, "Give an even number, or load the model with bi_data false.")
        if perm_mask is not None and perm_mask.shape != (batch_size, length, length):
            message = f"perm_mask is {tuple(perm_mask.shape)}, expected {(batch_size, length, length)}."
            raise MemtxError(message, "Match input_ids.")
        if target_mapping is not None:
            if target_mapping.dim() != 3 or target_mapping.shape[::2] != (batch_size, length):
                expected = f"expected ({batch_size}, num_targets, {length})."
                raise MemtxError(f"target_mapping is {tuple(target_mapping.shape)}, {expected}", "Match input_ids.")
            # Values on an accelerator are not checked: that would wait for it.
            if target_mapping.device.type == "cpu" and (target_mapping != 0).sum(-1).gt(1).any():
                raise MemtxError("target_mapping has a target with several positions.", "Mark one position in a row.")

    def _stream_inputs(
        self,
        content: Tensor,
        num_cached: int,
        state: MemoryState | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        document_starts: Tensor | None,
        perm_mask: Tensor | None,
    ) -> tuple[StreamInputs, Tensor | None]:
        """Return what both streams share, and the keys hidden from the query stream as in :class:`StreamInputs`."""
        (batch_size, length), device = content.shape[:2], content.device
        num_keys = num_cached + length
        sinusoids = self.dropout(relative_sinusoids(num_keys, length, content, self.clamp_length))[None]
        if self.bi_data:
            # Negating a distance negates its sines.
            signs = torch.ones(self.dim, dtype=content.dtype, device=device)
            signs[: self.dim // 2] = -1
            sinusoids = torch.cat([sinusoids, sinusoids * signs]).repeat_interleave(batch_size // 2, dim=0)
        hidden = None
        if attention_mask is not None or perm_mask is not None:
            hidden = torch.zeros(1, 1, length, dtype=torch.bool, device=device)
            hidden = hidden if attention_mask is None else hidden | (attention_mask[:, None] <= 0)
            hidden = F.pad(hidden if perm_mask is None else hidden | (perm_mask > 0), (num_cached, 0))
            hidden = hidden.expand(-1, length, -1)
        absent = None
        first_key = torch.zeros(1, dtype=torch.int64, device=device)  # of those that exist, by stream
        if state is not None and num_cached:
            first_key = (num_cached - state.position).clamp(min=0)
            absent = torch.arange(num_keys, device=device) < first_key[:, None, None]
        if document_starts is not None:
            document = document_starts.long().cumsum(1)
            is_other = document[:, :, None] != F.pad(document, (num_cached, 0))[:, None]
            absent = is_other if absent is None else absent | is_other
        if self.causal:
            key, query = torch.arange(num_keys, device=device), torch.arange(length, device=device)[:, None]
            later = (key > query + num_cached)[None]
            if self.same_length:
                later = later | (key - first_key[:, None, None] < query)
            hidden = later if hidden is None else hidden | later
        is_other_segment = None
        if token_type_ids is not None:
            is_other_segment = token_type_ids[:, :, None] != F.pad(token_type_ids, (num_cached, 0))[:, None]
        return StreamInputs(sinusoids, None, absent, is_other_segment), hidden

    def _next_memory(self, memory: Tensor | None, content: Tensor) -> tuple[RecurrentState]:
        """Return a layer's memory after a call, without gradient, padded at its beginning in a fresh stream."""
        hidden = content[:, : self.reuse_length].detach()
        if memory is not None:
            hidden = torch.cat([memory, hidden.to(memory.dtype)], dim=1)
        if self.memory_length is not None:
            hidden = F.pad(hidden, (0, 0, max(0, self.memory_length - hidden.shape[1]), 0))
            hidden = hidden[:, hidden.shape[1] - self.memory_length :]
        return (RecurrentState(hidden),)

    def _next_position(self, tokens: Tensor, state: MemoryState | None, document_starts: Tensor | None) -> Tensor:
        """Return the number of hidden states carried of each open document, those no longer in memory included."""
        num_carried = tokens[:, : self.reuse_length].shape[1]
        position = tokens.new_zeros(len(tokens), dtype=torch.int64) if state is None else state.position
        document_starts = None if document_starts is None else document_starts[:, :num_carried]
        return Segment.from_document_starts(position, num_carried, document_starts).next_position

    def _layers(self) -> list[TwoStreamBlock]:
        return cast(list[TwoStreamBlock], list(self.blocks))
