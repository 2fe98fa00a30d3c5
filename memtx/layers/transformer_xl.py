"""Transformer-XL's relative attention: separate scores, and biases, for content and for distance.

Dai et al. 2019, section 3.3. The score of query i and key j is (q_i + u) k_j + (q_i + v) r_(i-j): terms a and c, b and
d of the paper. The second depends on query and distance together, so no fused kernel can add it as a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError
from memtx.layers.attention import MemoryAttention
from memtx.layers.block import Block
from memtx.layers.positions.base import NoPositions
from memtx.layers.positions.relative import sinusoidal_embedding
from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.memory.recurrent import RecurrentMemory, RecurrentState, update_cache
from memtx.ops.attention.mask import KeyRange, Visibility, create_mask
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment


def distance_embeddings(num_keys: int, dim: int, clamp_length: int, like: Tensor) -> Tensor:
    """Return the embeddings of the distances num_keys - 1, ..., 1, 0, ``(num_keys, dim)``, in the dtype of ``like``.

    Distances above ``clamp_length`` are clamped to it; 0 or less disables the limit.
    """
    distance = torch.arange(num_keys - 1, -1, -1, device=like.device)
    return sinusoidal_embedding(distance.clamp(max=clamp_length) if clamp_length > 0 else distance, dim, like)


def relative_shift(scores: Tensor) -> Tensor:
    """Convert scores by distance to scores by key, both ``(..., queries, keys)``.

    Column p of the input is distance keys - 1 - p, and the last key is at the last query's position. Where a key would
    be after its query the result is meaningless.
    """
    queries, keys = scores.shape[-2:]
    # With one column more, each row is shifted by one against the previous row once the rows are cut again.
    flat = F.pad(scores, (1, 0)).flatten(-2)[..., queries:]
    return flat.view(*scores.shape[:-2], queries, keys)


DistanceInputs = tuple[Tensor, Tensor | None, Tensor | None]
"""Inputs of all layers: distance embeddings, farthest first, ``(keys, dim)``, and u and v if the layers share them."""


class TransformerXLMemory(RecurrentMemory):
    """The cache as published, with ``window`` entries: zeros where the document has no token yet, which are visible.

    Only for :class:`RelativeAttention`, which treats the segment's entries of other documents as zeros, too.
    """

    def __init__(self, dim: int, window: int = 512, same_length: bool = False) -> None:
        super().__init__(dim, window, same_length)

    def set_window(self, window: int, same_length: bool) -> None:
        """Set the hidden states carried; states of another window no longer fit."""
        super().set_window(window, same_length)
        self.cache_length = window

    def ring_layout(self) -> None:
        """Return None: decoding runs one call per token."""
        return None

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment]."""
        settings = (TransformerXLMemory, self.window, self.same_length)
        cache = state.hidden.to(x.dtype)
        entry_positions = segment.memo(settings, lambda: self._entry_positions(segment))
        return View((cache, x), entry_positions, next_state=RecurrentState(update_cache(cache, x, segment)))

    def _entry_positions(self, segment: Segment) -> EntryPositions:
        offset = torch.arange(-self.cache_length, segment.length, device=segment.position.device)[None]
        visible_until = offset + (self.window if self.same_length else INFINITE_OFFSET)
        key_range = KeyRange(offset.shape[1], -self.cache_length, 1, self.window if self.same_length else None)
        return EntryPositions(offset.double(), Visibility(offset, visible_until, segment.length, (key_range,)))


class RelativeAttention(MemoryAttention):
    """Attention of a segment over [memory | segment]; arguments not listed are those of :class:`MemoryAttention`.

    The layers of a call share :data:`DistanceInputs`, kept under the key "distance inputs" of the segment's memo.

    Args:
        clamp_length: Largest distance that is told apart; 0 or less for no limit.
        has_biases: If True, the layer has its own u and v, each ``(heads, head_dim)``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        memory: TransformerXLMemory,
        *,
        head_dim: int | None = None,
        clamp_length: int = -1,
        has_biases: bool = True,
        dropout: float = 0.0,
    ) -> None:
        positions = NoPositions(heads, head_dim or dim // heads)
        super().__init__(dim, heads, heads, memory, positions, head_dim=head_dim, dropout=dropout)
        self.clamp_length = clamp_length
        self.distance = Linear(dim, heads * self.head_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, self.head_dim)) if has_biases else None
        self.position_bias = nn.Parameter(torch.zeros(heads, self.head_dim)) if has_biases else None

    def set_memories(self, memory: Memory[Any], extra_memories: Sequence[Memory[Any]], *, gated_memory: bool) -> None:
        """Set the layer's cache; raises MemtxError for other memories."""
        if not isinstance(memory, TransformerXLMemory) or extra_memories:
            message = f"A layer of Transformer-XL cannot read {type(memory).__name__}, only its own cache."
            raise MemtxError(message, "Give memories to a MemoryTransformer.")
        super().set_memories(memory, (), gated_memory=False)

    def forward(
        self, x: Tensor, state: tuple[Any, ...], segment: Segment, norm: nn.Module | None = None
    ) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Attend to [memory | segment] and write the memory, as :meth:`MemoryAttention.forward` does.

        The memory keeps x, the inputs of the layer, as they are; ``norm`` is applied to cached and new inputs.
        """
        view = self.memory.read(state[0], x, segment, self)
        inputs = view.parts if norm is None else [norm(part) for part in view.parts]
        k, v = self._split_keys_values(torch.cat([self.key_value(part) for part in inputs], dim=1))
        # (batch, heads, length or memory_length + length, head_dim)
        q, k, v = (part.transpose(1, 2) for part in (self._project_queries(inputs[-1])[0], k, v))

        def distance_inputs() -> DistanceInputs:
            return distance_embeddings(k.shape[2], x.shape[-1], self.clamp_length, x), None, None

        sinusoids, *biases = segment.memo("distance inputs", distance_inputs)
        u, v_bias = biases if self.content_bias is None else (self.content_bias, self.position_bias)
        assert u is not None
        assert v_bias is not None
        r = self.distance(sinusoids).view(-1, self.heads, self.head_dim).transpose(0, 1)
        content_scores = (q + u[:, None]) @ k.transpose(-1, -2)
        # Entries of other documents count as zeros, like those of an empty memory.
        is_zero = None
        if segment.has_document_starts:
            is_zero = segment.memo("zero keys", lambda: _find_other_documents(segment, k.shape[2]))
            content_scores = content_scores.masked_fill(is_zero, 0.0)
        distance_scores = relative_shift((q + v_bias[:, None]) @ r.transpose(-1, -2))
        scores = (content_scores + distance_scores) * self.head_dim**-0.5
        dtype = torch.promote_types(scores.dtype, torch.float32)
        visibility = view.entry_positions.visibility
        hidden_keys = visibility.memo("hidden keys", lambda: ~create_mask(visibility))
        weights = torch.softmax(scores.to(dtype).masked_fill(hidden_keys, float("-inf")), dim=-1)
        if is_zero is not None:
            weights = weights.masked_fill(is_zero, 0.0)
        attended = F.dropout(weights, self.dropout, self.training).to(v.dtype) @ v
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        next_state, losses = self.memory.write(view, segment, LayerActivations(x, out, self))
        return out, (next_state,), losses


def _find_other_documents(segment: Segment, num_keys: int) -> Tensor:
    """Return which keys belong to another document than the query, ``(batch, 1, length, num_keys)`` bool."""
    document = F.pad(segment.document_id, (num_keys - segment.length, 0))  # the cache belongs to document 0
    return (document[:, None, :] != segment.document_id[:, :, None])[:, None]


class TransformerXLBlock(Block):
    """A layer with its norms before or after the parts, whose memory holds inputs without norm.

    Arguments as in :class:`memtx.models.transformer_xl.TransformerXL`.
    """

    attention: RelativeAttention

    def __init__(
        self, attention: RelativeAttention, feed_forward: nn.Module, dim: int, eps: float, dropout: float,
        pre_norm: bool,
    ) -> None:  # fmt: skip
        super().__init__(attention, feed_forward, nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps), dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Return the layer's output ``(batch, length, dim)``, and its memory's next state and losses."""
        norm = self.attention_norm if self.pre_norm else None
        attended, state, losses = self.attention(x, state, segment, norm)
        x = x + self.dropout(attended)
        if self.pre_norm:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), state, losses
        x = self.attention_norm(x)
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), state, losses

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of the layer's input x, all heads concatenated, ``(batch, length, heads * head_dim)``."""
        x = self.attention_norm(x) if self.pre_norm else x
        return self.attention.project(x, "value", frozen=False).flatten(2)
