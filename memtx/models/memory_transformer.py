"""The memory transformer: a decoder that reads a text segment by segment with a state of fixed size.

A segment's walk: embed -> find where the tokens stand -> every block, each with its own memory -> norm ->
vocabulary. The module holds weights only; what is carried between segments comes in and goes out as a value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtx.errors import CheckpointError, MemtxError, check_at_least
from memtx.hf import load
from memtx.layers.attention import MemoryAttention
from memtx.layers.block import Block
from memtx.layers.feed_forward import SwiGLU, reset_linear
from memtx.layers.positions.base import Positions, Rotary
from memtx.memory.base import Losses
from memtx.memory.compressed import CompressedMemory
from memtx.memory.kv_ring import DecodeStep, KVRing, from_ring
from memtx.models.add_memory import MemoryAugmentedModel, MemoryFactory
from memtx.models.recurrent_lm import MemoryOutput
from memtx.models.segmented_forward import LayerStates, find_chunk_ends, forward_in_chunks, forward_with_memory_tokens
from memtx.models.validation import check_inputs, check_valid_length
from memtx.ops.attention.dispatch import AttentionBackend
from memtx.ops.cpu.linear import Linear
from memtx.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from memtx.segment import Segment
from memtx.state import MemoryState


class MemoryTransformer(MemoryAugmentedModel):
    """A pre-norm decoder with a memory in every layer.

    Attributes:
        activation_checkpointing: whether the backward pass computes each layer again instead of keeping what its
            forward pass made (Chen et al. 2016): about a third slower, and the memory of one layer instead of all.

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width of the hidden states.
        depth: layers.
        heads: query heads a layer.
        kv_heads: key and value heads a layer; None for as many as query heads.
        memories: what layers carry between segments: one entry for all layers alike, or one a layer. An entry
            makes a memory from dim, or is a list of such for a layer with several: first the exact one, which
            carries the segment itself, then those that answer by themselves.
        norm: makes a normalisation from dim; ``torch.nn.LayerNorm`` is the classic choice.
        feed_forward: makes the position-wise part from dim; ``FeedForward`` is the classic choice.
        positions: makes what scores learn distances by from (heads, head_dim); ``Alibi`` is the other choice.
        bias: whether attention's projections have biases.
        out_bias: whether its last one has; as the others by default.
        head_dim: width of a head; dim / heads by default.
        qk_norm: makes a normalisation of each head's queries, and one of its keys, from head_dim; None for none.
        absolute_positions: makes what is added to embeddings by position from dim, such as ``LearnedPositions``; None
            for none.
        gated_memory: whether what memories show beyond the exact window enters each layer by a learned gate a head that
            begins at 0, so that a model trained without them computes what it computed (see :meth:`with_memory`).
        dropout: of embeddings and of what each part adds to the residual stream.
        attention_dropout: of attention weights (slower: no fused kernel has it).
        tie_embeddings: whether the output projection is the embedding.
        attention_backend: of the attention operation.

    Raises:
        MemtxError: a number is out of range or numbers do not divide as they must.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        kv_heads: int | None = None,
        memories: Sequence[Sequence[MemoryFactory] | MemoryFactory] = (CompressedMemory,),
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        feed_forward: Callable[[int], nn.Module] = SwiGLU,
        positions: Callable[[int, int], Positions] = Rotary,
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
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, heads=heads)
        if len(memories) not in (1, depth):
            raise MemtxError(
                f"There are {len(memories)} memories for {depth} layers.",
                f"Give one for all of them, or {depth}.",
            )
        for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0.0 <= share < 1.0:
                raise MemtxError(f"{name} is {share}.", "Give a probability from 0 up to, not including, 1.")
        self.activation_checkpointing = False
        self.save_init_args(arguments)
        self.vocab_size = vocab_size
        self.dim = dim
        self.depth = depth
        kv_heads = kv_heads if kv_heads is not None else heads
        stacks = [list(one) if isinstance(one, Sequence) else [one] for one in memories]
        if not all(stacks):
            raise MemtxError("A layer's list of memories is empty.", "Give NoMemory for a layer without.")
        per_layer = stacks if len(stacks) == depth else stacks * depth
        self.embedding = nn.Embedding(vocab_size, dim)
        self.absolute_positions = absolute_positions(dim) if absolute_positions is not None else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                MemoryAttention(
                    dim,
                    heads,
                    kv_heads,
                    stack[0](dim),
                    positions(heads, head_dim if head_dim is not None else dim // heads),
                    bias=bias,
                    out_bias=out_bias,
                    head_dim=head_dim,
                    qk_norm=qk_norm,
                    dropout=attention_dropout,
                    backend=attention_backend,
                    extra_memories=[memory(dim) for memory in stack[1:]],
                    gated_memory=gated_memory,
                ),
                feed_forward(dim),
                norm(dim),
                norm(dim),
                dropout,
            )
            for stack in per_layer
        )
        self._init_memory_tokens()
        self.norm = norm(dim)
        self.head = Linear(dim, vocab_size, bias=False)
        self.reset_parameters()
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], window: int | None = None) -> Self:
        """Build the model kept at ``path``, in eval mode: ours, or a published decoder.

        Args:
            path: a folder of :meth:`save_pretrained`, a training checkpoint, or a folder in the layout of the
                ``transformers`` library of a Llama, Mistral, Qwen 2, Qwen 3 or GPT-2.
            window: of such a folder alone, exact positions seen; by default those the model was trained with, at most
                4096. Layers that were trained with a narrower window keep it.

        Raises:
            CheckpointError: missing, damaged, of another class, or with tensors that do not fit; all are named.
            MemtxError: a window for a model of ours.
        """
        if not load.is_hf_checkpoint(path) and window is None:
            return super().from_pretrained(path)
        made = load.from_pretrained(path, window)
        if not isinstance(made, cls):
            raise CheckpointError(
                f"'{path}' holds a {type(made).__name__}, expected {cls.__name__}.",
                "memtx.from_pretrained picks the class by itself.",
            )
        return made

    def reset_parameters(self) -> None:
        """Draw all weights anew (GPT-2's rule: residual maps narrower by the square root of their number)."""
        std, residual_std = 0.02, 0.02 / (2 * self.depth) ** 0.5
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.head.weight, std=std)
        if self.memory_tokens is not None:
            nn.init.normal_(self.write_tokens, std=std)
        for block in self._layers():
            block.attention.reset_parameters(std, residual_std)
            reset_linear(block.feed_forward, std, residual_std)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """Return the state of fresh streams.

        Args:
            batch_size: streams in the batch.
            dtype: of what is carried; the weights' by default.
            device: the weights' by default.

        Raises:
            MemtxError: batch_size is not positive.
        """
        check_at_least(1, batch_size=batch_size)
        weight = self.embedding.weight
        like = torch.empty(0, dtype=dtype or weight.dtype, device=device or weight.device)
        layers = tuple(
            tuple(memory.init_state(batch_size, like=like) for memory in block.attention.memories)
            for block in self._layers()
        )
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64, device=like.device), layers)

    def forward(
        self,
        tokens: Tensor,
        state: MemoryState | None = None,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        valid_length: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment.

        Args:
            tokens: (rows, segment) int64.
            state: what the previous call returned; None for fresh streams.
            document_starts: (rows, segment) bool, where a document begins; nothing before it is seen from there on.
            labels: (rows, segment) int64, the token to be predicted at each place; -100 where none is.
            valid_length: (rows,) int64, in eval mode, how many tokens of each row are of its text, which may be none:
                what is put behind them changes neither them nor the next state. None where all are.
            return_hidden_states: whether to return hidden states.

        Raises:
            MemtxError: shapes do not fit each other, or valid_length was given to a model without
                :attr:`supports_padding`.
        """
        check_inputs(tokens, state, document_starts=document_starts, labels=labels)
        if valid_length is not None:
            check_valid_length(tokens, valid_length)
            if self.training or not self.supports_padding:
                raise MemtxError(
                    "valid_length was given "
                    + ("in training." if self.training else "to memories that read all tokens."),
                    "Give rows of one length.",
                )
        if document_starts is not None and document_starts.dtype != torch.bool:
            raise MemtxError(f"document_starts is {document_starts.dtype}, expected bool.", "Compare it with 0 first.")
        state = state if state is not None else self.init_state(tokens.shape[0])
        segment = Segment.from_document_starts(state.position, tokens.shape[1], document_starts, valid_length)
        x = self.dropout(self._embed(tokens, segment.position))
        through = partial(self._run_layers, keep_hidden_states=return_hidden_states)
        stops = find_chunk_ends(segment, self._layers())
        if self.memory_tokens is not None:
            given = self._layers(), self.memory_tokens, self.write_tokens, stops, x, state, document_starts
            hidden, layers, losses = forward_with_memory_tokens(through, *given)
        elif stops:
            hidden, layers, losses = forward_in_chunks(through, stops, x, state, document_starts)
        else:
            hidden, layers, losses = through(x, state.layers, segment)
        x = self.norm(hidden[-1])
        logits = loss = language_loss = nll = None
        if labels is None:
            logits = self.head(x)
        else:
            flat = labels.reshape(-1)
            total, nll = linear_cross_entropy(x.flatten(0, 1), self.head.weight, flat)
            nll = nll.view_as(labels)
            language_loss = total / (flat != IGNORE_INDEX).sum().clamp(min=1)
            loss = language_loss + sum(losses.values())
        return MemoryOutput(
            logits,
            tuple(hidden) if return_hidden_states else None,
            MemoryState(segment.next_position, layers),
            loss,
            language_loss,
            nll,
            losses,
        )

    def _embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return (..., dim) of tokens at positions, both (...) int64."""
        x: Tensor = self.embedding(tokens)
        return x if self.absolute_positions is None else x + self.absolute_positions(position)

    def _run_layers(
        self, x: Tensor, states: LayerStates, segment: Segment, keep_hidden_states: bool
    ) -> tuple[list[Tensor], LayerStates, Losses]:
        """Return the last layer's output, behind x and the others' where these are kept, next states and losses."""
        hidden, layers = [x], []
        named: dict[str, list[Tensor]] = {}
        for block, own in zip(self._layers(), states, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, own, found = checkpoint(block, x, own, segment, use_reentrant=False)
            else:
                x, own, found = block(x, own, segment)
            layers.append(own)
            for name, value in found.items():
                named.setdefault(name, []).append(value)
            hidden = [*hidden, x] if keep_hidden_states else [x]
        return hidden, tuple(layers), {name: torch.stack(values).mean() for name, values in named.items()}

    @property
    def supports_padding(self) -> bool:
        """Whether the rows of a call may be of different lengths."""
        return all(memory.supports_padding for block in self._layers() for memory in block.attention.memories)

    def to_rings(self, state: MemoryState) -> list[KVRing] | None:
        """Open a state for decoding in place, a ring a layer; None where a memory has no such form."""
        pairs = zip(self._layers(), state.layers, strict=True)
        rings = [block.attention.open_ring(own, state.position) for block, own in pairs]
        found = [ring for ring in rings if ring is not None]
        return found if len(found) == len(rings) else None

    def from_rings(self, rings: Sequence[KVRing], position: Tensor) -> MemoryState:
        """Return the state that rings hold, as a value; position: (rows,) int64, tokens read so far."""
        layers = []
        for block, ring in zip(self._layers(), rings, strict=True):
            layers.append((block.attention.memory.join_state(*from_ring(ring.layout, ring.hidden, position)),))
        return MemoryState(position.clone(), tuple(layers))

    def decode_step(self, tokens: Tensor, rings: Sequence[KVRing], step: DecodeStep) -> Tensor:
        """Read one token a row in eval mode, writing into rings: what :class:`memtx.inference.decoder.Decoder` runs.

        Args:
            tokens: (rows,) int64.
            rings: as opened by :meth:`to_rings`, changed in place.
            step: where the tokens stand.

        Returns:
            (rows, vocab) logits.
        """
        x = self._embed(tokens, step.position)
        for block, ring in zip(self._layers(), rings, strict=True):
            x = block.step(x, ring, step)
        logits: Tensor = self.head(self.norm(x))
        return logits
