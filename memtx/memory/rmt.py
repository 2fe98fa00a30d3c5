"""Memory of the Recurrent Memory Transformer (RMT) and of the associative one (ARMT), as published.

Both read a document segment by segment, each with full causal attention and none to earlier segments. What passes from
one segment to the next goes through memory tokens (:mod:`memtx.models.rmt` runs them through the layers):

- RMT (Bulatov et al. 2022, section 3.2; 2023) reads [memory | segment | memory] and carries the outputs of the last
  group, the write tokens, to both groups of the next segment.
- ARMT (Rodkin et al. 2024, section 3) reads [segment | memory], with the same learned tokens in every segment. Each
  layer writes its outputs at them into an associative matrix, which later segments read at the layer's input.

A segment is ``interval`` tokens of the document, so results do not depend on the lengths of the calls.
:class:`memtx.memory.memory_tokens.TokenMemory` differs: its window slides over the ends of intervals, its write tokens
are learned, and it reads the memory tokens without positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from memtx.errors import check_at_least, check_positive
from memtx.memory.base import ContentAttention, EntryPositions, Memory, View
from memtx.memory.parts import DPFPFeatureMap
from memtx.memory.recurrent import count_past_tokens, sliding_window, update_cache
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


class ReadTokens(Segment):
    """Positions of the memory tokens before a segment, which see nothing but each other."""


class WriteTokens(Segment):
    """Positions of the memory tokens after a segment, which see all of it."""


class _CachedState(Protocol):
    @property
    def hidden(self) -> Tensor: ...


S = TypeVar("S", bound=_CachedState)


class SegmentMemory(Memory[S], Generic[S]):
    """Exact memory of the open segment, which memory tokens follow: the part that RMT and ARMT share.

    All layers of a model have the same one, and no other memory. It is given positions within the segment.

    Args:
        dim: Width of the hidden states.
        num_tokens: Number of memory tokens.
        interval: Tokens of a document in a segment.
        bidirectional: If True, memory tokens of one group see each other in both directions, as in RMT's first code
            (2022, on Transformer-XL). If False, they are causal like all tokens, as in later ones, on pretrained
            decoders.

    Attributes:
        num_read_tokens: Memory tokens before a segment.

    Raises:
        MemtxError: A number is out of range.
    """

    num_read_tokens: int = 0

    def __init__(self, dim: int, num_tokens: int, interval: int, bidirectional: bool) -> None:
        super().__init__(dim)
        check_at_least(1, num_tokens=num_tokens, interval=interval)
        self.num_tokens, self.bidirectional = num_tokens, bidirectional
        self.interval: int = interval
        # The write tokens see the whole segment and each other.
        self.window = interval + num_tokens

    def read(self, state: S, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [read tokens | segment so far | inputs]."""
        is_read = isinstance(segment, ReadTokens)
        num_read = 0 if is_read else self.num_read_tokens
        num_cached = 0 if is_read else min(count_past_tokens(segment), self.window - 1)
        key = (SegmentMemory, num_read, num_cached, self.window, self.bidirectional)
        entry_positions = segment.memo(key, lambda: self._locate(segment, num_read, num_cached))
        cache = state.hidden.to(x.dtype)
        parts = (*self._read_inputs(state, x)[:num_read], cache[:, cache.shape[1] - num_cached :], x)
        is_text = not isinstance(segment, ReadTokens | WriteTokens)
        hidden = update_cache(cache, x, segment) if is_text else cache
        return View(
            parts, entry_positions, next_state=self._next_state(state, x, segment, hidden.to(state.hidden.dtype))
        )

    def _read_inputs(self, state: S, x: Tensor) -> tuple[Tensor, ...]:
        """Return the layer's inputs at the read tokens, if the memory has them."""
        return ()

    def _next_state(self, state: S, x: Tensor, segment: Segment, hidden: Tensor) -> S:
        return cast("S", replace(cast("Any", state), hidden=hidden))

    def _locate(self, segment: Segment, num_read: int, num_cached: int) -> EntryPositions:
        positions = sliding_window(segment, num_cached, self.window)
        visible_from, visible_until = positions.visibility.visible_from, positions.visibility.visible_until
        offset, key_ranges = positions.offset, positions.visibility.key_ranges
        if self.bidirectional and isinstance(segment, ReadTokens | WriteTokens):
            visible_from = visible_from.clamp(max=0)
            key_ranges = (KeyRange(offset.shape[1]),)
        if num_read:
            # Right before the segment's first token, in every stream.
            index = torch.arange(-num_read, 0, device=offset.device) - segment.past_length[:, None]
            always = torch.full_like(index, INFINITE_OFFSET)
            offset = torch.cat([index.double(), offset.expand(index.shape[0], -1)], dim=1)
            visible_from = torch.cat([-always, visible_from], dim=1)
            visible_until = torch.cat([always, visible_until], dim=1)
            key_ranges = (KeyRange(num_read), *key_ranges)
        return EntryPositions(offset, Visibility(visible_from, visible_until, segment.length, key_ranges))


@state_dataclass
class RMTState:
    """The memory tokens and the open segment.

    Attributes:
        tokens: Memory tokens that the open segment reads and overwrites, the same in every layer, ``(batch, num_tokens,
            dim)``.
        read_inputs: The layer's inputs at the read tokens, ``(batch, num_tokens, dim)``.
        hidden: The layer's inputs at the tokens of the open segment, newest last, ``(batch, interval + num_tokens - 1,
            dim)``.
    """

    tokens: Tensor
    read_inputs: Tensor
    hidden: Tensor


class RMTMemory(SegmentMemory[RMTState]):
    """Memory tokens before and after every segment (Bulatov et al. 2022, section 3.2), in place of a window.

    Args:
        dim: Width of the hidden states.
        num_tokens: Number of memory tokens.
        interval: Tokens of a document in a segment.
        bidirectional: If True, memory tokens of one group see each other in both directions, as in the code of 2022.

    Raises:
        MemtxError: A number is out of range.
    """

    # The first segment of a stream has no memory tokens, so streams of a batch differ in their number of keys.
    supports_relative_positions = False

    def __init__(self, dim: int, num_tokens: int = 10, interval: int = 512, bidirectional: bool = False) -> None:
        super().__init__(dim, num_tokens, interval, bidirectional)
        self.num_read_tokens = num_tokens

    def init_state(self, batch_size: int, *, like: Tensor) -> RMTState:
        """Return zeros: nothing read."""
        tokens = like.new_zeros(batch_size, self.num_tokens, self.dim)
        return RMTState(tokens, tokens.clone(), like.new_zeros(batch_size, self.window - 1, self.dim))

    def _read_inputs(self, state: RMTState, x: Tensor) -> tuple[Tensor, ...]:
        return (state.read_inputs.to(x.dtype),)

    def _next_state(self, state: RMTState, x: Tensor, segment: Segment, hidden: Tensor) -> RMTState:
        read_inputs = x.to(state.read_inputs.dtype) if isinstance(segment, ReadTokens) else state.read_inputs
        return RMTState(state.tokens, read_inputs, hidden)


@state_dataclass
class ARMTState:
    """The associations and the open segment.

    Attributes:
        matrix: Associations A, ``(batch, feature_dim, dim)``, float32 or wider.
        normalizer: Sum of their keys z, ``(batch, feature_dim)``, same dtype.
        hidden: The layer's inputs at the tokens of the open segment, newest last, ``(batch, interval + num_tokens - 1,
            dim)``.
    """

    matrix: Tensor
    normalizer: Tensor
    hidden: Tensor


class ARMTMemory(SegmentMemory[ARMTState]):
    """Associations written at memory tokens after every segment (Rodkin et al. 2024, section 3), in place of a window.

    Args:
        dim: Width of the hidden states.
        num_tokens: Number of memory tokens.
        interval: Tokens of a document in a segment.
        key_dim: Width of the keys before the feature map.
        order: Order of the feature map, DPFP.
        bidirectional: If True, the memory tokens see each other in both directions.
        eps: Constant added to denominators.

    Raises:
        MemtxError: A number is out of range.
    """

    changes_layer_input: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_tokens: int = 10,
        interval: int = 512,
        key_dim: int = 64,
        order: int = 3,
        bidirectional: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, num_tokens, interval, bidirectional)
        check_at_least(1, key_dim=key_dim)
        check_positive(eps=eps)
        self.key_dim, self.order, self.eps = key_dim, order, eps
        self.feature_map = DPFPFeatureMap(key_dim, order, normalize=False)
        self.query = Linear(dim, key_dim, bias=False)
        self.key = Linear(dim, key_dim, bias=False)
        self.value = Linear(dim, dim, bias=False)
        self.write_gate = Linear(dim, 1)
        # As in the published code, so that a pretrained model is unchanged at first.
        nn.init.zeros_(self.value.weight)

    def init_state(self, batch_size: int, *, like: Tensor) -> ARMTState:
        """Return zeros: nothing read or written."""
        dtype, feature_dim = torch.promote_types(like.dtype, torch.float32), self.feature_map.feature_dim
        return ARMTState(
            like.new_zeros(batch_size, feature_dim, self.dim, dtype=dtype),
            like.new_zeros(batch_size, feature_dim, dtype=dtype),
            like.new_zeros(batch_size, self.window - 1, self.dim),
        )

    def _recall(self, state: ARMTState, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the matrix holds at features ``(batch, n, feature_dim)``, and their products with z."""
        overlap = (features @ state.normalizer[..., None]).squeeze(-1)
        return features @ state.matrix / (overlap + self.eps)[..., None], overlap

    def on_layer_input(self, state: ARMTState, x: Tensor) -> Tensor:
        """Add the associations of each input x ``(batch, length, dim)``: A' phi(q) / z' phi(q)."""
        features = self.feature_map(self.query(x).to(state.matrix.dtype))
        return x + self._recall(state, features)[0].to(x.dtype)

    def write_tokens(self, state: ARMTState, outputs: Tensor) -> ARMTState:
        """Write the layer's outputs at the memory tokens, ``(batch, num_tokens, dim)``, all at once.

        A key's old value is taken away, and z counts only the part of a key that it does not hold yet.
        """
        dtype = state.matrix.dtype
        features, values = self.feature_map(self.key(outputs).to(dtype)), self.value(outputs).to(dtype)
        present, overlap = self._recall(state, features)
        strength = torch.sigmoid(self.write_gate(outputs)).to(dtype)
        matrix = state.matrix + features.mT @ (strength * (values - present))
        novelty = (1 - overlap / (features.square().sum(-1) + self.eps)).clamp(0.0, 1.0).detach()
        normalizer = state.normalizer + (novelty[..., None] * features).sum(1)
        return ARMTState(matrix, normalizer, state.hidden)
