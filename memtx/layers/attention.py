"""Attention of a segment over what its memories opened: one fused call over [memory | cache | segment].

What memories answer by themselves is joined with it before the last projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.combine import apply_gate, combine_readouts
from memtx.layers.positions.base import Memoize, Positions
from memtx.memory.base import LayerActivations, Losses, Memory, Readout, View
from memtx.memory.kv_ring import DecodeStep, KVRing, to_ring
from memtx.ops.attention.bias import ScoreBias, append_key_bias, slice_bias
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import Visibility, split_bank
from memtx.ops.cpu.linear import Linear, linear
from memtx.segment import Segment


class MemoryAttention(nn.Module):
    """Queries from the segment; keys and values from all that the exact memory opens.

    Args:
        dim: width of the hidden states.
        heads: query heads.
        kv_heads: key and value heads; each serves ``heads / kv_heads`` query heads (grouped-query attention,
            Ainslie et al. 2023).
        memory: what is carried between segments and attended to; the exact one.
        positions: how scores learn distances.
        bias: whether the projections have biases.
        out_bias: whether the last one has; as the others by default.
        head_dim: width of a head; dim / heads by default.
        qk_norm: makes a normalisation of every head's queries, and one of its keys, from head_dim, applied before
            positions are (Dehghani et al. 2023, section 2); None for none.
        dropout: of attention weights.
        backend: of the attention operation.
        extra_memories: memories that answer by themselves.
        gated_memory: whether what memories show beyond the exact window enters by a learned gate a head, which begins
            at 0: the layer of a model that was trained without them computes what it computed.

    Raises:
        MemtxError: the numbers of heads do not divide as they must, or a memory stands where it cannot.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        memory: Memory[Any],
        positions: Positions,
        *,
        bias: bool = False,
        out_bias: bool | None = None,
        head_dim: int | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        backend: AttentionBackend = "auto",
        extra_memories: Sequence[Memory[Any]] = (),
        gated_memory: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise MemtxError(f"dim is {dim}, which {heads} heads do not divide.", "Choose a divisor, or give head_dim.")
        if heads % kv_heads:
            raise MemtxError(f"heads is {heads}, which {kv_heads} kv_heads do not divide.", "Choose a divisor.")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim if head_dim is not None else dim // heads
        self.dropout = dropout
        self.backend: AttentionBackend = backend
        self.positions = positions
        self.set_memories(memory, extra_memories, gated_memory=gated_memory)
        self.query = Linear(dim, heads * self.head_dim, bias=bias)
        self.key_value = Linear(dim, 2 * kv_heads * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.query_norm = qk_norm(self.head_dim) if qk_norm is not None else nn.Identity()
        self.key_norm = qk_norm(self.head_dim) if qk_norm is not None else nn.Identity()

    def set_memories(self, memory: Memory[Any], extra_memories: Sequence[Memory[Any]], *, gated_memory: bool) -> None:
        """Put memories in the place of those that the layer has; arguments as in the class."""
        _check_memory_order(memory, extra_memories)
        if self.heads * self.head_dim != memory.dim:
            _check_readout_width(memory.dim, self.heads, self.head_dim, extra_memories)
        self.memory = memory
        self.extra_memories = nn.ModuleList(extra_memories)
        sources = memory.has_bank + sum(one.needs_gate for one in extra_memories) if gated_memory else 0
        # A row for what lies beyond the window of the exact memory, then one for each of the others, in order.
        self.gate = nn.Parameter(torch.zeros(sources, self.heads)) if sources else None

    @property
    def memories(self) -> tuple[Memory[Any], ...]:
        """The exact memory, then those that answer by themselves."""
        # The type as text: the compiler cannot build generic ones.
        return (self.memory, *cast("list[Memory[Any]]", list(self.extra_memories)))

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Attend, and hand the memories what they need to close.

        Args:
            x: (rows, segment, dim), normed layer inputs.
            state: one a memory; of the first ones alone, the others are left out.
            segment: where the tokens stand.

        Returns:
            (rows, segment, dim), the next states, and named auxiliary losses.
        """
        memories = self.memories[: len(state)]
        views = [memory.read(own, x, segment, self) for memory, own in zip(memories, state, strict=True)]
        view = views[0]
        q = self._project_queries(x)
        k, v = self._split_keys_values(torch.cat([self.key_value(part) for part in view.parts], dim=1))
        readouts = self._readouts(memories, views, q)
        q, k, bias = self.positions(q, k, view.entry_positions, segment)
        split = memories[0].has_bank and self.gate is not None
        need_lse = split or any(one.lse is not None for one in readouts)
        if view.key_bias is not None:
            q, k, v = append_key_bias(q, k, v, view.key_bias, self.head_dim**-0.5)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if split:
            bank, exact = split_bank(view.entry_positions.visibility)
            out, lse = self._attend(
                q, k[:, :, : bank.num_keys], v[:, :, : bank.num_keys], bank, slice_bias(bias, 0, bank.num_keys), True
            )
            readouts.append(apply_gate(Readout(out, lse=lse), cast(Tensor, self.gate)[0].tanh()))
            attended, lse = self._attend(
                q,
                k[:, :, bank.num_keys :],
                v[:, :, bank.num_keys :],
                exact,
                slice_bias(bias, bank.num_keys, None),
                True,
            )
        else:
            attended, lse = self._attend(q, k, v, view.entry_positions.visibility, bias, need_lse)
        out = self.out(combine_readouts(attended, lse, readouts).transpose(1, 2).flatten(2))
        losses: Losses = {}
        after, trace = [], LayerActivations(x, out, self)
        for memory, own in zip(memories, views, strict=True):
            next_state, found_losses = memory.write(own, segment, trace)
            after.append(next_state)
            for name, value in found_losses.items():
                losses[name] = losses[name] + value if name in losses else value
        return out, tuple(after), losses

    @property
    def needs_layer_output(self) -> bool:
        """Whether a memory waits for the layer's outputs."""
        return any(memory.write_source == "output" for memory in self.memories)

    def on_layer_output(self, state: tuple[Any, ...], outputs: Tensor, segment: Segment) -> tuple[Any, ...]:
        """Give the memories the layer's outputs, (rows, segment, dim), normed as its inputs are."""
        pairs = zip(self.memories[: len(state)], state, strict=True)
        return tuple(memory.on_layer_output(own, outputs, segment) for memory, own in pairs)

    def _readouts(self, memories: Sequence[Memory[Any]], views: Sequence[View], q: Tensor) -> list[Readout]:
        """Return what the memories answer to queries q, gated where the layer is."""
        found = []
        row = int(memories[0].has_bank)
        for memory, view in zip(memories, views, strict=True):
            one = memory.readout(view, q)
            if one is None:
                continue
            if self.gate is not None and memory.needs_gate:
                one, row = apply_gate(one, self.gate[row].tanh()), row + 1
            found.append(one)
        return found

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and, where needed, the log-sum-exp, of (rows, heads, n, head_dim or more) tensors."""
        out, lse = segment_attention(
            q,
            k,
            v,
            visibility,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            scale=self.head_dim**-0.5,
            backend=self.backend,
            return_lse=need_lse,
        )
        return out[..., : self.head_dim], lse

    def _project_queries(self, x: Tensor) -> Tensor:
        """Return (rows, segment, heads, head_dim), without positions."""
        out: Tensor = self.query_norm(self.query(x).unflatten(-1, (self.heads, self.head_dim)))
        return out

    def _split_keys_values(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return both (rows, entries, kv_heads, head_dim), without positions."""
        k, v = projected.view(*projected.shape[:-1], 2, self.kv_heads, self.head_dim).unbind(-3)
        return self.key_norm(k), v

    def open_ring(self, state: tuple[Any, ...], position: Tensor) -> KVRing | None:
        """Open a layer's state for decoding in place; None where its memories are decoded by whole calls.

        Args:
            state: one a memory; a layer with several has no such form.
            position: (rows,) int64, tokens of each row's document read so far.
        """
        layout = self.memory.ring_layout()
        if layout is None or self.extra_memories or self.gate is not None:
            return None
        cache, bank = self.memory.split_state(state[0])
        hidden = to_ring(layout, cache, bank, position)
        blocks, positions = layout.slot_contents(position - 1)
        at = torch.cat(
            [blocks.double() * layout.compression_rate + (layout.compression_rate - 1) / 2, positions.double()], dim=1
        )
        return KVRing(layout, hidden, self._positioned_keys_values(hidden, at, lambda _, make: make()))

    def _positioned_keys_values(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Return keys, placed, and values (rows, entries, 2, kv_heads, head_dim) of x (rows, entries, dim)."""
        k, v = self._split_keys_values(self.key_value(x))
        return torch.stack([self.positions.apply_absolute(k, position, memo), v], dim=-3)

    def step(self, x: Tensor, ring: KVRing, step: DecodeStep) -> Tensor:
        """Attend for one token a row, which is written into the ring.

        Args:
            x: (rows, dim), normed layer inputs.
            ring: the layer's, changed in place.
            step: where the tokens stand.

        Returns:
            (rows, dim).
        """
        seen = step.plan(ring.layout)
        row = step.memo("rows", lambda: torch.arange(x.shape[0], device=x.device))
        position = step.memo("position", lambda: step.position[:, None].double())
        # Taken out first: the token's slot is that of the block's oldest state.
        block = ring.hidden[row[:, None], seen.block_slots] if seen.block_slots is not None else None
        ring.hidden[row, seen.slot] = x.to(ring.hidden.dtype)
        ring.key_value[row, seen.slot] = self._positioned_keys_values(x[:, None], position, step.memo)[:, 0]
        if block is not None:
            probe = ring.hidden[row[:, None], seen.recent_slots]
            entry = self.memory.compress_block(block.to(x.dtype), probe.to(x.dtype), self)
            kept = self._positioned_keys_values(entry[:, None], seen.entry_position, step.memo)[:, 0]
            # Rows whose block does not cross keep what stands there.
            for buffer, new in ((ring.hidden, entry), (ring.key_value, kept)):
                crossing = seen.evicts_block.view(-1, *(1,) * (new.dim() - 1))
                buffer[row, seen.bank_slot] = torch.where(crossing, new.to(buffer.dtype), buffer[row, seen.bank_slot])
        q = self.positions.apply_absolute(self._project_queries(x[:, None]), position, step.memo)
        k, v = ring.key_value.unbind(2)
        attended, _ = segment_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            seen.visibility,
            bias=self.positions.score_bias(seen.offset, step.memo),
            backend=self.backend,
        )
        out: Tensor = self.out(attended.flatten(1))
        return out

    def project(self, x: Tensor, projection: str, *, frozen: bool) -> Tensor:
        """Project to queries, keys or values without positions (see :class:`memtx.memory.base.ContentAttention`)."""
        half = int(projection == "value")
        layer = self.query if projection == "query" else self.key_value
        if isinstance(layer, nn.Linear):
            weights = [one if projection == "query" else one.chunk(2)[half] for one in layer.parameters()]
            out = linear(x, *(one.detach() if frozen else one for one in weights))
        else:
            # A module that adapts the map stands in its place, and gives keys and values together.
            out = _apply_module(layer, x, frozen)
            out = out if projection == "query" else out.chunk(2, dim=-1)[half]
        out = out.view(*out.shape[:-1], -1, self.head_dim)
        if projection == "query":
            return _apply_module(self.query_norm, out, frozen)
        out = _apply_module(self.key_norm, out, frozen) if projection == "key" else out
        return out.repeat_interleave(self.heads // self.kv_heads, dim=-2)

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as a query without positions sees them (see :class:`memtx.memory.base.ContentAttention`)."""
        return self.positions.apply_relative(keys, distance)

    def reset_parameters(self, std: float, residual_std: float) -> None:
        """Draw the projections; the memory's own parameters keep the values it gave them."""
        with torch.no_grad():
            for layer, width in ((self.query, std), (self.key_value, std), (self.out, residual_std)):
                nn.init.normal_(layer.weight, std=width)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _apply_module(module: nn.Module, x: Tensor, frozen: bool) -> Tensor:
    """Return what a module makes of x, without letting its weights learn where frozen."""
    weights = {name: one.detach() for name, one in module.named_parameters()} if frozen else {}
    out: Tensor = torch.func.functional_call(module, weights, (x,)) if frozen else module(x)
    return out


def _check_memory_order(memory: Memory[Any], extra_memories: Sequence[Memory[Any]]) -> None:
    """Raise unless the first memory of a layer, and it alone, carries the segment."""
    if memory.has_readout:
        raise MemtxError(
            f"{type(memory).__name__} stands first in a layer, but it does not carry the segment itself.",
            "Put an exact memory before it: RecurrentMemory, CompressedMemory or NoMemory.",
        )
    for one in extra_memories:
        if not one.has_readout:
            raise MemtxError(
                f"{type(one).__name__} stands behind another memory of its layer, but only the first is exact.",
                "Give it a layer of its own, or take it out.",
            )


def _check_readout_width(dim: int, heads: int, head_dim: int, extra_memories: Sequence[Memory[Any]]) -> None:
    """Raise where a memory's answers, dim wide over all heads, do not fit heads of another width."""
    for one in extra_memories:
        if not one.uses_layer_projections:
            raise MemtxError(
                f"{type(one).__name__} answers {dim} wide, {heads} heads of {head_dim} are {heads * head_dim} wide.",
                "Use CompressedMemory, SinkMemory or TokenMemory, which read by the layer's own projections.",
            )
