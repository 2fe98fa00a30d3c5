"""The memory transformer: a decoder that reads a text segment by segment with a state of fixed size.

A segment's path: embedding -> positions of the tokens -> every block, each with its own memory -> norm -> vocabulary.
The module holds weights only; the state is passed in and returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtx.checkpoint.pretrained import PretrainedModel
from memtx.errors import MemtxError, check_at_least, check_probability
from memtx.layers.attention import MemoryAttention
from memtx.layers.block import Block, run_recomputed
from memtx.layers.feed_forward import SwiGLU, reset_linear
from memtx.layers.lm_head import AdaptiveEmbedding, LinearHead, LMHead, build_head, init_vocabulary
from memtx.layers.positions.rotary import Rotary
from memtx.memory.base import Losses
from memtx.memory.compressed import CompressedMemory
from memtx.memory.copy_memory import CopyMemory, CopyView
from memtx.memory.kv_ring import DecodeBuffers, DecodeStep
from memtx.models.growing_windows import GrowingWindows, expand_memories
from memtx.models.layer_factories import (
    FeedForwardFactory,
    MemoryFactory,
    NormPlacement,
    PositionsFactory,
    build_block,
    memory_stacks,
    per_layer,
)
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.rmt import SegmentTokens
from memtx.models.segmented_forward import LayerStates, MemoryTokens, TokenParts, find_chunk_ends, forward_in_chunks
from memtx.models.validation import check_inputs, check_segment, check_valid_length
from memtx.ops.attention.dispatch import AttentionBackend
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.segment import Segment
from memtx.state import MemoryState


class MemoryTransformer(PretrainedModel):
    """A pre-norm decoder with a memory in every layer.

    Attributes:
        activation_checkpointing: If True, recompute each layer in the backward pass instead of storing its activations
            (Chen et al. 2016): about a third slower, with the memory of one layer instead of all.
        memory_tokens: Settings of the memory tokens in the layers; None without them.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the hidden states.
        depth: Number of layers.
        heads: Query heads per layer.
        kv_heads: Key-value heads per layer. Defaults to ``heads``.
        memories: Memory factories, given dim: one entry for all layers, or one per layer. An entry is a factory, or a
            list of factories for a layer with several memories: first the exact one, which carries the segment itself,
            then those with a readout of their own. A memory such as ``GatedDeltaNet`` replaces attention in its layer.
            :class:`GrowingWindows` is a short form.
        norm: Factory of the norms, given dim; ``torch.nn.LayerNorm`` is the classic choice.
        feed_forward: Factory of the feed-forward part, given dim; ``FeedForward`` is the classic choice.
        positions: Factory of the position encoding, given (heads, head_dim); ``Alibi`` is the alternative.
        bias: If True, the attention projections have biases.
        out_bias: If True, the output projection has a bias. Defaults to ``bias``.
        head_dim: Width of a head. Defaults to dim / heads.
        qk_norm: Factory of the norms of each head's queries and keys, given head_dim. None disables them.
        absolute_positions: Factory of position embeddings, given dim, such as ``LearnedPositions``. None disables them.
        gated_memory: If True, entries beyond the exact window enter each layer through a learned gate per head that
            begins at 0, so that a model trained without them computes the same (see :meth:`with_memory`).
        dropout: Dropout rate of the embeddings and the residual branches.
        attention_dropout: Dropout rate of the attention weights (slower: fused kernels do not support it).
        tie_embeddings: If True, the output projection is the embedding.
        attention_backend: Backend of the attention operation.
        norm_placement: Norms before ("pre") or after ("post") each part of a layer, both ("sandwich", Gemma 2), or of
            the sums with their inputs ("residual", Vaswani et al. 2017). A list gives one per layer.
        output_gate: If True, attention outputs are gated per channel (Qiu et al. 2025, section 3).
        joint_qk_norm: If True, ``qk_norm`` normalizes all heads of a token at once.
        query_scale: Factor of the queries, besides 1 / sqrt(head_dim).
        embedding_scale: Factor of the embeddings in the layers' input, not in the output projection.
        layer_feed_forward: One ``feed_forward`` per layer. Defaults to the same for all.
        layer_positions: One ``positions`` per layer. Defaults to the same for all.
        output_memory: Factory of a memory that is mixed into the prediction, given dim. None disables it.
        adaptive_embedding: Factory of embeddings by cluster, given (vocab_size, dim), such as ``AdaptiveInputs``; the
            output is then an adaptive softmax with the same clusters. None disables it.

    Raises:
        MemtxError: A number is out of range, or numbers do not divide as they must.
    """

    # A subclass that creates parts of its own inherits the rest.
    output_memory: CopyMemory | None
    embedding: nn.Module
    embedding_scale: Tensor
    scales_embedding = False
    head: LMHead
    memory_tokens: MemoryTokens | SegmentTokens | None
    write_tokens: nn.Parameter

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        kv_heads: int | None = None,
        memories: Sequence[Sequence[MemoryFactory] | MemoryFactory] | GrowingWindows = (CompressedMemory,),
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        feed_forward: FeedForwardFactory = SwiGLU,
        positions: PositionsFactory = Rotary,
        bias: bool = False,
        out_bias: bool | None = None,
        head_dim: int | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        absolute_positions: Callable[[int], nn.Module] | None = None,
        gated_memory: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tie_embeddings: bool = True,
        attention_backend: AttentionBackend = "auto",
        norm_placement: Sequence[NormPlacement] | NormPlacement = "pre",
        output_gate: bool = False,
        joint_qk_norm: bool = False,
        query_scale: float = 1.0,
        embedding_scale: float = 1.0,
        layer_feed_forward: Sequence[FeedForwardFactory] | None = None,
        layer_positions: Sequence[PositionsFactory] | None = None,
        output_memory: Callable[[int], CopyMemory] | None = None,
        adaptive_embedding: Callable[[int, int], AdaptiveEmbedding] | None = None,
    ) -> None:
        arguments = dict(locals())
        arguments["memories"] = layer_memories = expand_memories(memories, depth)
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        check_probability(dropout=dropout, attention_dropout=attention_dropout)
        self.save_init_args(arguments)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.activation_checkpointing = False
        self.embedding = (adaptive_embedding or nn.Embedding)(vocab_size, dim)
        self.absolute_positions = absolute_positions(dim) if absolute_positions is not None else None
        # In the dtype of the weights, as the published models have it.
        self.register_buffer("embedding_scale", torch.tensor(float(embedding_scale)), persistent=False)
        self.scales_embedding = embedding_scale != 1.0
        self.dropout = nn.Dropout(dropout)
        attention = partial(
            MemoryAttention, dim, heads, kv_heads if kv_heads is not None else heads, bias=bias, out_bias=out_bias,
            head_dim=head_dim, qk_norm=qk_norm, dropout=attention_dropout, backend=attention_backend,
            gated_memory=gated_memory, output_gate=output_gate, joint_qk_norm=joint_qk_norm, query_scale=query_scale,
        )  # fmt: skip
        position_args = heads, head_dim if head_dim is not None else dim // heads
        self.blocks = nn.ModuleList(
            build_block(dim, stack, attention, partial(make_positions, *position_args), make_ff, norm, norms, dropout)
            for stack, make_positions, make_ff, norms in zip(
                memory_stacks(layer_memories, depth),
                per_layer("layer_positions", layer_positions or positions, depth),
                per_layer("layer_feed_forward", layer_feed_forward or feed_forward, depth),
                per_layer("norm_placement", cast("Any", norm_placement), depth),
                strict=True,
            )
        )
        self.init_memory_tokens()
        self.norm = nn.Identity() if self._layers()[-1].is_normalized else norm(dim)
        self.output_memory = output_memory(dim) if output_memory is not None else None
        self.head = build_head(self.embedding, vocab_size, dim, tie_embeddings, self.output_memory)
        self.reset_parameters()
        if tie_embeddings and isinstance(self.head, LinearHead):
            self.head.weight = cast("nn.Embedding", self.embedding).weight

    def with_memory(
        self,
        memories: Sequence[MemoryFactory] | MemoryFactory = (),
        *,
        window: int | None = None,
        num_sinks: int | None = None,
        layers: Sequence[int] | None = None,
        gated_memory: bool = True,
        output_memory: Callable[[int], CopyMemory] | None = None,
    ) -> Self:
        """Return a copy with added memories that shares its weights; see :func:`memtx.models.add_memory.add_memory`."""
        from memtx.models.add_memory import add_memory  # which imports this module

        return add_memory(
            self, memories, window=window, num_sinks=num_sinks, layers=layers, gated_memory=gated_memory,
            output_memory=output_memory,
        )  # fmt: skip

    def without_memory(self, window: int) -> Self:
        """Return a copy with an exact window alone; see :func:`memtx.models.add_memory.remove_memory`."""
        from memtx.models.add_memory import remove_memory

        return remove_memory(self, window)

    def memory_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all memories by name: their own, gates, log-weights and the write tokens."""
        parts = (".attention.memory.", ".attention.extra_memories.", ".attention.gate", ".attention.entry_bias")
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(("write_tokens", "output_memory.")) or any(part in name for part in parts)
        }

    def init_memory_tokens(self) -> None:
        """Set ``memory_tokens`` to those of the layers, and create the learned tokens they need, uninitialized."""
        self.memory_tokens = SegmentTokens.from_blocks(self._layers()) or MemoryTokens.from_blocks(self._layers())
        if self.memory_tokens is not None:
            self.write_tokens = nn.Parameter(torch.empty(self.memory_tokens.num_tokens, self.dim))

    @property
    def _weight(self) -> nn.Parameter:
        """A weight of a layer, for dtype and device; the embedding may be absent."""
        return next(self.blocks.parameters())

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def reset_parameters(self) -> None:
        """Initialize all weights by GPT-2's rule: residual projections are scaled by 1 / sqrt(number of them)."""
        std, residual_std = 0.02, 0.02 / (2 * self.depth) ** 0.5
        init_vocabulary(self.embedding, self.head, std)
        if self.memory_tokens is not None:
            nn.init.normal_(self.write_tokens, std=std)
        for block in self._layers():
            block.attention.reset_parameters(std, residual_std)
            reset_linear(block.feed_forward, std, residual_std)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` (at least 1) fresh streams; dtype and device default to the weights'."""
        check_at_least(1, batch_size=batch_size)
        like = torch.empty(0, dtype=dtype or self._weight.dtype, device=device or self._weight.device)
        layers = tuple(
            tuple(memory.init_state(batch_size, like=like) for memory in block.attention.memories)
            for block in self._layers()
        )
        if self.output_memory is not None:
            layers = (*layers, (self.output_memory.init_state(batch_size, like=like),))
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64, device=like.device), layers)

    def forward(
        self,
        tokens: Tensor | None = None,
        state: MemoryState | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        valid_length: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment.

        Args:
            tokens: ``(batch, length)`` int64; None with ``inputs_embeds``.
            inputs_embeds: ``(batch, length, dim)`` in place of ``embedding(tokens)``, cast to the dtype of the weights.
            state: State returned by the previous call; None for fresh streams.
            document_starts: ``(batch, length)`` bool, True where a document begins; later tokens see nothing before it.
            labels: ``(batch, length)`` int64, the token to predict at each position; -100 is ignored.
            valid_length: ``(batch,)`` int64, in eval mode: number of leading tokens that count, possibly 0; padding
                behind them changes neither their output nor the next state. None if all count.
            return_hidden_states: If True, return the hidden states.

        Raises:
            MemtxError: Shapes do not fit each other, not exactly one of ``tokens`` and ``inputs_embeds`` is given,
                ``inputs_embeds`` is given to a model with an ``output_memory``, which copies token ids, or
                ``valid_length`` in training or to a model without :attr:`supports_padding`.
        """
        batch_size, length = check_inputs(tokens, inputs_embeds, self.dim)
        if inputs_embeds is not None and self.output_memory is not None:
            message = "inputs_embeds was given to a model with an output_memory, which copies token ids."
            raise MemtxError(message, "Give tokens, or a model without output_memory.")
        check_segment(batch_size, length, state, document_starts=document_starts, labels=labels)
        if valid_length is not None:
            check_valid_length(batch_size, length, valid_length)
            if self.training or not self.supports_padding:
                reason = "in training" if self.training else "to memories that do not support padding"
                raise MemtxError(f"valid_length was given {reason}.", "Give segments of equal length instead.")
        if document_starts is not None and document_starts.dtype != torch.bool:
            raise MemtxError(f"document_starts is {document_starts.dtype}, expected bool.", "Compare it with 0 first.")
        state = state if state is not None else self.init_state(batch_size)
        segment = Segment.from_document_starts(state.position, length, document_starts, valid_length)
        x = self.embedding(tokens) if inputs_embeds is None else inputs_embeds.to(self._weight.dtype)
        position = segment.position
        if self.memory_tokens is not None:
            position = self.memory_tokens.input_position(position)
        x = self.dropout(self._add_positions(x, position))
        run_layers = partial(self._run_layers, keep_hidden_states=return_hidden_states)
        layer_states, output_states = list(state.layers[: self.depth]), state.layers[self.depth :]
        call = (x, replace(state, layers=tuple(layer_states)), document_starts)
        if self.memory_tokens is not None:
            parts = TokenParts(run_layers, self._layers(), self.write_tokens, self.norm, self.absolute_positions)
            hidden, layers, losses = self.memory_tokens.forward(parts, segment, *call)
        elif chunk_ends := find_chunk_ends(segment, self._layers()):
            hidden, layers, losses = forward_in_chunks(run_layers, chunk_ends, *call)
        else:
            inputs = [x]
            del state, call, x  # The embeddings and fresh states are freed as layers read them.
            hidden, layers, losses = self._run_layers(inputs.pop(), layer_states, segment, return_hidden_states)
        x = self.norm(hidden[-1])
        copy_view = None
        if self.output_memory is not None:
            copy_view = self.output_memory.read(output_states[0][0], x, cast("Tensor", tokens), segment)
            layers = (*layers, (copy_view.next_state,))
            copy_view = None if self.output_memory.is_hidden else copy_view
        logits = loss = language_loss = nll = None
        if labels is None:
            logits = self.head(x)
            if copy_view is not None:
                logits = copy_view.mix(logits)
        else:
            nll_sum, nll = self._nll(x, labels, copy_view)
            language_loss = nll_sum / (labels != IGNORE_INDEX).sum().clamp(min=1)
            loss = language_loss + sum(losses.values())
        hidden_states = tuple(hidden) if return_hidden_states else None
        next_state = MemoryState(segment.next_position, layers)
        return MemoryOutput(logits, hidden_states, next_state, loss, language_loss, nll, losses)

    def _nll(self, x: Tensor, labels: Tensor, copy_view: CopyView | None) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of the labels, summed with gradient, and of each, ``(batch, length)``."""
        if copy_view is None:
            nll_sum, nll = self.head.nll(x.flatten(0, 1), labels.reshape(-1))
        else:
            log_share, log_copied = (share.flatten() for share in copy_view.label_log_shares(labels))
            head = cast("LinearHead", self.head)
            nll_sum, nll = head.nll(x.flatten(0, 1), labels.reshape(-1), (log_share, log_copied))
        return nll_sum, nll.view_as(labels)

    def _add_positions(self, x: Tensor, position: Tensor) -> Tensor:
        """Return the layers' input ``(..., dim)`` for embeddings ``(..., dim)`` at positions ``(...)`` int64."""
        x = x * self.embedding_scale if self.scales_embedding else x
        return x if self.absolute_positions is None else x + self.absolute_positions(position)

    def _run_layers(
        self, x: Tensor, states: Sequence[tuple[Any, ...]], segment: Segment, keep_hidden_states: bool
    ) -> tuple[list[Tensor], LayerStates, Losses]:
        """Return hidden states, next states and losses; only the last hidden state unless all are kept.

        A list of states is emptied.
        """
        hidden, next_states = [x], []
        remaining = states if isinstance(states, list) else list(states)
        losses: dict[str, list[Tensor]] = {}
        for block in self._layers():
            if self.activation_checkpointing and torch.is_grad_enabled():
                call = (block, x, remaining.pop(0), segment)
                x, layer_state, layer_losses = checkpoint(run_recomputed, *call, use_reentrant=False)
            else:
                x, layer_state, layer_losses = block(x, remaining.pop(0), segment)
            next_states.append(layer_state)
            for name, value in layer_losses.items():
                losses.setdefault(name, []).append(value)
            hidden = [*hidden, x] if keep_hidden_states else [x]
        return hidden, tuple(next_states), {name: torch.stack(values).mean() for name, values in losses.items()}

    @property
    def supports_padding(self) -> bool:
        """If True, the streams of a call may have different lengths (``valid_length``)."""
        return all(memory.supports_padding for block in self._layers() for memory in block.attention.memories)

    def to_rings(self, state: MemoryState) -> list[DecodeBuffers] | None:
        """Return a ring per layer, then the output memory's, with a state's content; None if a memory has no ring."""
        blocks = zip(self._layers(), state.layers[: self.depth], strict=True)
        rings = [block.attention.open_ring(layer_state, state.position) for block, layer_state in blocks]
        if (memory := self.output_memory) is not None:
            rings.append(memory.open_ring(state.layers[-1][0], state.position))
        supported = [ring for ring in rings if ring is not None]
        return supported if len(supported) == len(rings) else None

    def from_rings(self, rings: Sequence[DecodeBuffers], position: Tensor) -> MemoryState:
        """Return the content of the rings as a state; position: ``(batch,)`` int64, tokens read so far."""
        blocks = zip(self._layers(), rings[: self.depth], strict=True)
        layers = tuple(block.attention.close_ring(cast("Any", ring), position) for block, ring in blocks)
        if self.output_memory is not None:
            layers = (*layers, (self.output_memory.close_ring(rings[-1], position),))
        return MemoryState(position.clone(), layers)

    def decode_step(self, tokens: Tensor, rings: Sequence[DecodeBuffers], step: DecodeStep) -> Tensor:
        """Return logits ``(batch, vocab)`` after one more token ``(batch,)`` int64 per stream, in eval mode.

        For the Decoder: ``rings``, from :meth:`to_rings`, are changed in place; ``step`` has the tokens' positions.
        """
        x = self._add_positions(self.embedding(tokens), step.position)
        for block, ring in zip(self._layers(), rings[: self.depth], strict=True):
            x = block.step(x, ring, step)
        x = self.norm(x)
        logits = self.head(x)
        if self.output_memory is not None:
            logits = self.output_memory.step(x, logits, tokens, rings[-1], step)
        return logits
