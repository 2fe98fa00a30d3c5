"""Attention of a segment over the entries of its memories: one fused call over [memory | cache | segment].

Memories that answer by themselves are combined with its output before the last projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_divisible
from memtx.layers.combine import apply_gate, combine_readouts
from memtx.layers.norms import JointHeadNorm
from memtx.layers.positions.base import Memoize, Positions
from memtx.memory.base import LayerActivations, Losses, Memory, Readout, ReadoutMemory, View
from memtx.memory.kv_ring import DecodeStep, KVRing, RingDecodable, from_ring, to_ring
from memtx.ops.attention.bias import ScoreBias, append_key_bias, split_bias
from memtx.ops.attention.dilation import attend_slots
from memtx.ops.attention.dispatch import AttentionBackend, has_decode_kernel, segment_attention
from memtx.ops.attention.mask import BankSplit, Visibility, split_bank
from memtx.ops.cpu.linear import Linear, linear
from memtx.segment import Segment


class MemoryAttention(nn.Module):
    """Attention with queries from the segment and keys and values from the entries of the exact memory.

    Args:
        dim: Width of the hidden states.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; each serves ``heads / kv_heads`` query heads (grouped-query attention,
            Ainslie et al. 2023).
        memory: The exact memory: what attention sees besides the segment.
        positions: Position encoding.
        bias: If True, the projections have biases.
        out_bias: If True, the output projection has a bias. Defaults to ``bias``.
        head_dim: Width of a head. Defaults to dim / heads.
        qk_norm: Factory of a norm of each head's queries, and one of its keys, from head_dim, applied before positions
            (Dehghani et al. 2023, section 2). None disables it.
        dropout: Dropout rate of the attention weights.
        backend: Attention backend.
        extra_memories: Memories that answer by themselves.
        gated_memory: If True, everything from beyond the exact window passes a learned gate per head that starts at 0,
            so that a layer trained without memory is unchanged at first.
        output_gate: If True, the heads' outputs are multiplied by sigmoids of the input (Qiu et al. 2025, section 3).
        joint_qk_norm: If True, ``qk_norm`` normalizes all heads of a token at once and is given their joint width.
        query_scale: Factor of the queries, besides 1 / sqrt(head_dim).

    Raises:
        MemtxError: dim is not divisible by heads, heads not by kv_heads, or a memory cannot be in its place.
    """

    gate_parameters = ("gate", "entry_bias")  # see Memory

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
        output_gate: bool = False,
        joint_qk_norm: bool = False,
        query_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_divisible("Choose a divisor, or give head_dim.", dim=dim, heads=heads)
        check_divisible(heads=heads, kv_heads=kv_heads)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim if head_dim is not None else dim // heads
        self.dropout = dropout
        self.backend: AttentionBackend = backend
        self.positions = positions
        self.set_memories(memory, extra_memories, gated_memory=gated_memory)
        self.output_gate, self.query_scale = output_gate, query_scale
        # With an output gate, each head's query is followed by its gate.
        self.query = Linear(dim, heads * self.head_dim * (2 if output_gate else 1), bias=bias)
        self.key_value = Linear(dim, 2 * kv_heads * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.query_norm, self.key_norm = (
            nn.Identity()
            if qk_norm is None
            else (JointHeadNorm(qk_norm, count, self.head_dim) if joint_qk_norm else qk_norm(self.head_dim))
            for count in (heads, kv_heads)
        )

    def set_memories(self, memory: Memory[Any], extra_memories: Sequence[Memory[Any]], *, gated_memory: bool) -> None:
        """Replace the layer's memories; arguments as in the constructor."""
        _check_memories(memory, extra_memories, self.heads, self.head_dim)
        self.positions.check_memories(memory, *extra_memories)
        self.memory = memory
        self.extra_memories = nn.ModuleList(extra_memories)
        # Gates of the exact memory's bank, then of each other gated memory, in order.
        num_gates = memory.has_bank + sum(extra.needs_gate for extra in extra_memories) if gated_memory else 0
        self.gate = nn.Parameter(torch.zeros(num_gates, self.heads)) if num_gates else None
        bias = memory.entry_bias if memory.has_bank else None
        self.entry_bias = nn.Parameter(torch.full((self.heads,), bias)) if bias is not None else None

    @property
    def memories(self) -> tuple[Memory[Any], ...]:
        """The exact memory, then those that answer by themselves."""
        # torch.compile cannot evaluate generic types, so the type is a string.
        return (self.memory, *cast("list[Memory[Any]]", list(self.extra_memories)))

    @property
    def needs_layer_output(self) -> bool:
        """True if a memory waits for the layer's output."""
        return any(memory.needs_layer_output for memory in self.memories)

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Attend from normalized layer inputs x, ``(batch, length, dim)``, to the memories, and write them.

        Returns the output in the same shape, the next states, and auxiliary losses by name. There is one state per
        memory; if there are fewer, the last memories are ignored.
        """
        memories = self.memories[: len(state)]
        views = [memory.read(part, x, segment, self) for memory, part in zip(memories, state, strict=True)]
        q, gate = self._project_queries(x)
        projected = [self.key_value(part) for part in views[0].parts if part.shape[1]]
        k, v = self._split_keys_values(projected[0] if len(projected) == 1 else torch.cat(projected, dim=1))
        readouts = self._readouts(views, q)
        entry_positions = views[0].entry_positions
        q, k, bias = self.positions(q, k, entry_positions, segment)
        bias = bias if (extend_bias := views[0].extend_bias) is None else extend_bias(bias)
        if views[0].key_bias is not None:
            q, k, v = append_key_bias(q, k, v, views[0].key_bias, self.head_dim**-0.5)
        visibility = entry_positions.visibility

        def bank_split() -> BankSplit:
            return entry_positions.bank_split or split_bank(visibility)

        attended = self._attend_and_combine(q, k, v, visibility, bank_split, bias, readouts)
        del q, k, v, readouts, projected
        out = self.out(self._apply_output_gate(attended.transpose(1, 2).flatten(2), gate))
        out = self._transform_output(memories, views, out, segment)
        next_state, losses = self._write(memories, views, segment, LayerActivations(x, out, self))
        return out, next_state, losses

    def on_layer_output(self, state: tuple[Any, ...], outputs: Tensor, segment: Segment) -> tuple[Any, ...]:
        """Pass the layer's outputs, ``(batch, length, dim)``, normalized like its inputs, to the memories."""
        pairs = zip(self.memories[: len(state)], state, strict=True)
        return tuple(memory.on_layer_output(part, outputs, segment) for memory, part in pairs)

    def _readouts(self, views: Sequence[View], q: Tensor) -> list[Readout]:
        """Return the readouts of all memories but the first, gated if the layer is."""
        readouts = []
        index = int(self.memory.has_bank)
        for memory, view in zip(self.memories[1 : len(views)], views[1:], strict=True):
            readout = cast("ReadoutMemory", memory).readout(view, q)
            if self.gate is not None and memory.needs_gate:
                readout, index = apply_gate(readout, self.gate[index].tanh()), index + 1
            if not memory.is_hidden:
                readouts.append(readout)
        return readouts

    def _attend_and_combine(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        bank_split: Callable[[], BankSplit],
        bias: ScoreBias | None,
        readouts: list[Readout],
    ) -> Tensor:
        """Attend to the exact memory's entries and combine the readouts.

        What lies beyond the exact window is attended to apart if it is hidden, or has a gate or a log-weight.
        """
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        is_hidden = self.memory.is_hidden
        if self._splits_bank:
            split = bank_split()
            (bank_k, k), (bank_v, v), (bank_bias, bias) = split.split(k), split.split(v), split_bias(bias, split)
            visibility = split.exact
            if split.bank.num_keys and not is_hidden:
                out, lse = self._attend(q, bank_k, bank_v, split.bank, bank_bias, return_lse=True)
                assert lse is not None
                readout = Readout(out, lse=lse if self.entry_bias is None else lse + self.entry_bias[:, None])
                readouts = [*readouts, readout if self.gate is None else apply_gate(readout, self.gate[0].tanh())]
        return_lse = any(readout.lse is not None for readout in readouts)
        out, lse = self._attend(q, k, v, visibility, bias, return_lse=return_lse)
        return combine_readouts(out, lse, readouts)

    @property
    def _splits_bank(self) -> bool:
        """If True, what lies beyond the exact window is attended to apart."""
        has_weight = self.gate is not None or self.entry_bias is not None
        return self.memory.has_bank and (has_weight or self.memory.is_hidden)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, *, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs, ``(batch, heads, length, head_dim)``, and their log-sum-exp if requested."""
        dropout, scale = self.dropout if self.training else 0.0, self.head_dim**-0.5
        out, lse = segment_attention(
            q, k, v, visibility, bias=bias, dropout=dropout, scale=scale, backend=self.backend, return_lse=return_lse
        )
        # A key bias adds a column to the heads.
        return out if out.shape[-1] == self.head_dim else out[..., : self.head_dim], lse

    def _transform_output(
        self, memories: Sequence[Memory[Any]], views: list[View], out: Tensor, segment: Segment
    ) -> Tensor:
        """Return the output as the memories change it, by the mean of their gates if the layer has any; set views."""
        gates, gate_index = self.gate, int(self.memory.has_bank)
        for index, memory in enumerate(memories):
            transformed, views[index] = memory.transform_output(views[index], out, segment)
            if gates is not None and index and memory.needs_gate:
                if transformed is not out:
                    transformed = torch.lerp(out, transformed, gates[gate_index].tanh().mean().to(out.dtype))
                gate_index += 1
            out = out if memory.is_hidden else transformed
        return out

    def _write(
        self, memories: Sequence[Memory[Any]], views: Sequence[View], segment: Segment, activations: LayerActivations
    ) -> tuple[tuple[Any, ...], Losses]:
        """Return the next states of the memories and their losses, summed by name."""
        states: list[Any] = []
        total: Losses = {}
        for memory, view in zip(memories, views, strict=True):
            state, losses = memory.write(view, segment, activations)
            states.append(state)
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        return tuple(states), total

    def _project_queries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the queries without positions and the output gates' inputs, ``(batch, length, heads, head_dim)``."""
        projected = self.query(x).view(*x.shape[:-1], self.heads, -1)
        q, gate = projected.chunk(2, dim=-1) if self.output_gate else (projected, None)
        if gate is not None and not torch.is_grad_enabled():
            gate = gate.contiguous()  # which frees the projection
        q = self.query_norm(q).to(projected.dtype)  # CUDA's autocast normalizes in float32
        return (q if self.query_scale == 1.0 else q * self.query_scale), gate

    def _apply_output_gate(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Multiply the heads' outputs, ``(..., heads * head_dim)``, by the sigmoids of the gates' inputs, if any."""
        if gate is None:
            return attended
        if torch.is_grad_enabled():
            return attended * torch.sigmoid(gate).view(attended.shape)
        return attended.mul_(gate.sigmoid_().view(attended.shape))

    def _split_keys_values(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys without positions and values, each ``(batch, entries, kv_heads, head_dim)``."""
        k, v = projected.view(*projected.shape[:-1], 2, self.kv_heads, self.head_dim).unbind(-3)
        return self.key_norm(k).to(v.dtype), v

    def _positioned_keys_values(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Return the keys with positions and the values of x ``(batch, entries, dim)``, stacked in dimension -3."""
        k, v = self._split_keys_values(self.key_value(x))
        return torch.stack([self.positions.apply_absolute(k, position, memo), v], dim=-3)

    def open_ring(self, state: tuple[Any, ...], past_length: Tensor) -> KVRing | None:
        """Open the layer's state for decoding in place; None unless its single memory can be decoded that way.

        ``past_length`` is the number of tokens of each stream's document read so far, ``(batch,)`` int64.
        """
        layout = self.memory.ring_layout() if isinstance(self.memory, RingDecodable) else None
        if layout is None or self.extra_memories:
            return None
        cache, bank = cast("RingDecodable", self.memory).split_state(state[0])
        hidden = to_ring(layout, cache, bank, past_length)
        block, position = layout.slot_contents(past_length - 1)
        position = torch.cat([layout.block_center(block), position.double()], dim=1)
        key_value = self._positioned_keys_values(hidden, position, lambda _, compute: compute())
        return KVRing((hidden, key_value), layout=layout)

    def close_ring(self, ring: KVRing, past_length: Tensor) -> tuple[Any, ...]:
        """Return the layer's state from its ring: the inverse of :meth:`open_ring`."""
        memory = cast("RingDecodable", self.memory)
        return (memory.join_state(*from_ring(ring.layout, ring.hidden, past_length)),)

    def step(self, x: Tensor, ring: KVRing, step: DecodeStep) -> Tensor:
        """Return the output ``(batch, dim)`` for normalized inputs x of one token per stream, written into the ring."""
        plan = step.plan(ring.layout)
        stream = step.memo("stream", lambda: torch.arange(x.shape[0], device=x.device))
        position = step.memo("position", lambda: step.position[:, None].double())
        # Read before the token is written: its slot holds the oldest state of the evicted block.
        block = ring.hidden[stream[:, None], plan.block_slots] if plan.block_slots is not None else None
        q, gate = self._project_queries(x[:, None])
        k, v = self._split_keys_values(self.key_value(x[:, None]))
        is_plain = self.positions.is_rotation and not self._splits_bank and ring.layout.dilated is None
        has_kernel = is_plain and has_decode_kernel(q, self.backend)
        if not has_kernel or block is not None:
            ring.hidden[stream, plan.slot] = x.to(ring.hidden.dtype)
        if not has_kernel:
            key_value = torch.stack([self.positions.apply_absolute(k, position, step.memo), v], dim=-3)
            ring.key_value[stream, plan.slot] = key_value[:, 0]
        if block is not None:
            recent = ring.hidden[stream[:, None], plan.recent_slots]
            entry = cast("RingDecodable", self.memory).compress_block(block.to(x.dtype), recent.to(x.dtype), self)
            key_value = self._positioned_keys_values(entry[:, None], plan.entry_position, plan.visibility.memo)[:, 0]
            # Streams that evict no block keep the contents of the slot.
            for buffer, update in ((ring.hidden, entry), (ring.key_value, key_value)):
                evicts = plan.evicts_block.view(-1, *(1,) * (update.dim() - 1))
                current = buffer[stream, plan.bank_slot]
                buffer[stream, plan.bank_slot] = torch.where(evicts, update.to(buffer.dtype), current)
        if has_kernel:
            from memtx.ops.attention.triton_decode import attend_ring

            rotation = self.positions.rotation(position, step.memo)
            attended = attend_ring(
                q[:, 0], k[:, 0], v[:, 0], None if rotation is None else rotation[:, 0, 0], x, *ring.buffers, plan.slot,
                plan.visible, self.head_dim**-0.5,
            )  # fmt: skip
            return self.out(self._apply_output_gate(attended.flatten(1), gate))
        q, bias = self.positions.step(q, position, plan, step.memo)
        k, v = ring.key_value.unbind(2)
        if (dilated := ring.layout.dilated) is not None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            attend = partial(self._attend, return_lse=False)
            attended = attend_slots(q, k, v, step.position, dilated, bias, attend)
        else:
            attended = self._attend_and_combine(q, k, v, plan.visibility, lambda: plan.bank_split, bias, [])
        return self.out(self._apply_output_gate(attended.flatten(1), gate))

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of normalized inputs x, all heads concatenated, ``(batch, length, heads * head_dim)``."""
        return self.project(x, "value", frozen=False).flatten(2)

    def project(self, x: Tensor, projection: str, *, frozen: bool) -> Tensor:
        """Project x without positions (see :class:`memtx.memory.base.ContentAttention`)."""
        is_query, half = projection == "query", int(projection == "value")
        layer = self.query if is_query else self.key_value
        if isinstance(layer, nn.Linear):
            weights = [weight if is_query else weight.chunk(2)[half] for weight in layer.parameters()]
            out = linear(x, *(weight.detach() if frozen else weight for weight in weights))
        else:
            # A module that adapts the projection has replaced it and returns keys and values together.
            out = _apply_module(layer, x, frozen)
            out = out if is_query else out.chunk(2, dim=-1)[half]
        if is_query:
            out = out.view(*out.shape[:-1], self.heads, -1)[..., : self.head_dim]
            out = _apply_module(self.query_norm, out, frozen).to(out.dtype)
            return out if self.query_scale == 1.0 else out * self.query_scale
        out = out.view(*out.shape[:-1], -1, self.head_dim)
        out = _apply_module(self.key_norm, out, frozen).to(out.dtype) if projection == "key" else out
        return out.repeat_interleave(self.heads // self.kv_heads, dim=-2)

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Apply positions to keys seen from a distance (see :class:`memtx.memory.base.ContentAttention`)."""
        return self.positions.apply_relative(keys, distance)

    def reset_parameters(self, std: float, residual_std: float) -> None:
        """Initialize the projections; the memories' own parameters stay as their constructors set them."""
        for layer, layer_std in ((self.query, std), (self.key_value, std), (self.out, residual_std)):
            nn.init.normal_(layer.weight, std=layer_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.positions.reset_parameters(std)


def _apply_module(module: nn.Module, x: Tensor, frozen: bool) -> Tensor:
    """Apply a module to x, without gradients for its weights if ``frozen``."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()} if frozen else {}
    out: Tensor = torch.func.functional_call(module, weights, (x,)) if frozen else module(x)
    return out


def _check_memories(memory: Memory[Any], extra_memories: Sequence[Memory[Any]], heads: int, head_dim: int) -> None:
    """Raise unless the first memory is exact, the others answer by themselves, and their readouts fit the heads."""
    dilation = getattr(memory, "dilation", 1)
    if isinstance(dilation, Sequence) and len(dilation) > heads:
        message = f"dilation ({list(dilation)}) is that of {len(dilation)} heads, but the layer has {heads}."
        raise MemtxError(message, "Give at most one number per head.")
    if isinstance(memory, ReadoutMemory):
        raise MemtxError(
            f"{type(memory).__name__} is the first memory of a layer but does not carry the segment itself.",
            "Put an exact memory before it: RecurrentMemory, CompressedMemory or NoMemory.",
        )
    for extra in extra_memories:
        name = type(extra).__name__
        if not isinstance(extra, ReadoutMemory):
            raise MemtxError(
                f"{name} follows another memory of its layer, but only the first can be exact.",
                f"Give {name} a layer of its own, or remove it.",
            )
        if heads * head_dim != memory.dim and not extra.uses_layer_projections:
            raise MemtxError(
                f"{name} answers {memory.dim} wide, but {heads} heads of {head_dim} are {heads * head_dim} wide.",
                "Use CompressedMemory, SinkMemory or TokenMemory, which read with the layer's own projections.",
            )
