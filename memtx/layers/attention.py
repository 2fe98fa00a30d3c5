"""Attention of a segment over what its memories opened: one fused call over [memory | cache | segment].

What memories answer by themselves is joined with it before the last projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.positions import Once, Positions
from memtx.layers.readouts import gated, joined
from memtx.memory.base import Losses, Memory, Readout, Trace, View
from memtx.memory.ring import Ring, Step, opened
from memtx.ops.attention.bias import ScoreBias, cut
from memtx.ops.attention.dispatch import Backend, segment_attention
from memtx.ops.attention.weights import with_weights
from memtx.ops.linear import Linear, linear
from memtx.ops.visibility import Visibility, parted
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
        head_norm: makes a normalisation of every head's queries, and one of its keys, from head_dim, applied before
            positions are (Dehghani et al. 2023, section 2); None for none.
        dropout: of attention weights.
        backend: of the attention operation.
        beside: memories that answer by themselves.
        gated: whether what memories show beyond the exact window enters by a learned gate a head, which begins at 0:
            the layer of a model that was trained without them computes what it computed.

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
        head_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        backend: Backend = "auto",
        beside: Sequence[Memory[Any]] = (),
        gated: bool = False,
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
        self.backend: Backend = backend
        self.positions = positions
        self.mount(memory, beside, gated=gated)
        self.query = Linear(dim, heads * self.head_dim, bias=bias)
        self.key_value = Linear(dim, 2 * kv_heads * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, dim, bias=bias if out_bias is None else out_bias)
        self.query_norm = head_norm(self.head_dim) if head_norm is not None else nn.Identity()
        self.key_norm = head_norm(self.head_dim) if head_norm is not None else nn.Identity()

    def mount(self, memory: Memory[Any], beside: Sequence[Memory[Any]], *, gated: bool) -> None:
        """Put memories in the place of those that the layer has; arguments as in the class."""
        _check_order(memory, beside)
        if self.heads * self.head_dim != memory.dim:
            _check_width(memory.dim, self.heads, self.head_dim, beside)
        self.memory = memory
        self.beside = nn.ModuleList(beside)
        sources = memory.beyond + sum(not one.native for one in beside) if gated else 0
        # A row for what lies beyond the window of the exact memory, then one for each of the others, in order.
        self.gate = nn.Parameter(torch.zeros(sources, self.heads)) if sources else None

    @property
    def memories(self) -> tuple[Memory[Any], ...]:
        """The exact memory, then those that answer by themselves."""
        # The type as text: the compiler cannot build generic ones.
        return (self.memory, *cast("list[Memory[Any]]", list(self.beside)))

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
        q = self._queries(x)
        k, v = self._keys_values(torch.cat([self.key_value(part) for part in view.parts], dim=1))
        readouts = self._answers(memories, views, q)
        q, k, bias = self.positions(q, k, view.places, segment)
        split = memories[0].beyond and self.gate is not None
        need_lse = split or any(one.lse is not None for one in readouts)
        if view.weight is not None:
            q, k, v = with_weights(q, k, v, view.weight, self.head_dim**-0.5)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if split:
            bank, exact = parted(view.places.visibility)
            out, lse = self._attend(q, k[:, :, : bank.keys], v[:, :, : bank.keys], bank, cut(bias, 0, bank.keys), True)
            readouts.append(gated(Readout(out, lse=lse), cast(Tensor, self.gate)[0].tanh()))
            attended, lse = self._attend(
                q, k[:, :, bank.keys :], v[:, :, bank.keys :], exact, cut(bias, bank.keys, None), True
            )
        else:
            attended, lse = self._attend(q, k, v, view.places.visibility, bias, need_lse)
        out = self.out(joined(attended, lse, readouts).transpose(1, 2).flatten(2))
        losses: Losses = {}
        after, trace = [], Trace(x, out, self)
        for memory, own in zip(memories, views, strict=True):
            next_state, found_losses = memory.write(own, segment, trace)
            after.append(next_state)
            for name, value in found_losses.items():
                losses[name] = losses[name] + value if name in losses else value
        return out, tuple(after), losses

    @property
    def settles(self) -> bool:
        """Whether a memory waits for the layer's outputs."""
        return any(memory.depends_on == "output" for memory in self.memories)

    def settle(self, state: tuple[Any, ...], outputs: Tensor, segment: Segment) -> tuple[Any, ...]:
        """Give the memories the layer's outputs, (rows, segment, dim), normed as its inputs are."""
        pairs = zip(self.memories[: len(state)], state, strict=True)
        return tuple(memory.settle(own, outputs, segment) for memory, own in pairs)

    def _answers(self, memories: Sequence[Memory[Any]], views: Sequence[View], q: Tensor) -> list[Readout]:
        """Return what the memories answer to queries q, gated where the layer is."""
        found = []
        row = int(memories[0].beyond)
        for memory, view in zip(memories, views, strict=True):
            one = memory.recall(view, q)
            if one is None:
                continue
            if self.gate is not None and not memory.native:
                one, row = gated(one, self.gate[row].tanh()), row + 1
            found.append(one)
        return found

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs and, where needed, the log-sum-exp, of (rows, heads, n, head_dim or more) tensors."""
        found = segment_attention(
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
        out, lse = found if isinstance(found, tuple) else (found, None)
        return out[..., : self.head_dim], lse

    def _queries(self, x: Tensor) -> Tensor:
        """Return (rows, segment, heads, head_dim), without positions."""
        out: Tensor = self.query_norm(self.query(x).unflatten(-1, (self.heads, self.head_dim)))
        return out

    def _keys_values(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return both (rows, entries, kv_heads, head_dim), without positions."""
        k, v = projected.view(*projected.shape[:-1], 2, self.kv_heads, self.head_dim).unbind(-3)
        return self.key_norm(k), v

    def ring(self, state: tuple[Any, ...], position: Tensor) -> Ring | None:
        """Open a layer's state for decoding in place; None where its memories are decoded by whole calls.

        Args:
            state: one a memory; a layer with several has no such form.
            position: (rows,) int64, tokens of each row's document read so far.
        """
        layout = self.memory.layout()
        if layout is None or self.beside or self.gate is not None:
            return None
        cache, bank = self.memory.carried(state[0])
        hidden = opened(layout, cache, bank, position)
        blocks, positions = layout.held(position - 1)
        at = torch.cat([blocks.double() * layout.rate + (layout.rate - 1) / 2, positions.double()], dim=1)
        return Ring(layout, hidden, self._kept(hidden, at, lambda _, make: make()))

    def _kept(self, x: Tensor, position: Tensor, once: Once) -> Tensor:
        """Return keys, placed, and values (rows, entries, 2, kv_heads, head_dim) of x (rows, entries, dim)."""
        k, v = self._keys_values(self.key_value(x))
        return torch.stack([self.positions.placed(k, position, once), v], dim=-3)

    def step(self, x: Tensor, ring: Ring, step: Step) -> Tensor:
        """Attend for one token a row, which is written into the ring.

        Args:
            x: (rows, dim), normed layer inputs.
            ring: the layer's, changed in place.
            step: where the tokens stand.

        Returns:
            (rows, dim).
        """
        seen = step.seen(ring.layout)
        row = step.once("rows", lambda: torch.arange(x.shape[0], device=x.device))
        position = step.once("position", lambda: step.position[:, None].double())
        # Taken out first: the token's slot is that of the block's oldest state.
        block = ring.hidden[row[:, None], seen.block] if seen.block is not None else None
        ring.hidden[row, seen.slot] = x.to(ring.hidden.dtype)
        ring.key_value[row, seen.slot] = self._kept(x[:, None], position, step.once)[:, 0]
        if block is not None:
            probe = ring.hidden[row[:, None], seen.probe]
            entry = self.memory.compressed(block.to(x.dtype), probe.to(x.dtype), self)
            kept = self._kept(entry[:, None], seen.centre, step.once)[:, 0]
            # Rows whose block does not cross keep what stands there.
            for buffer, new in ((ring.hidden, entry), (ring.key_value, kept)):
                crossing = seen.crossing.view(-1, *(1,) * (new.dim() - 1))
                buffer[row, seen.target] = torch.where(crossing, new.to(buffer.dtype), buffer[row, seen.target])
        q = self.positions.placed(self._queries(x[:, None]), position, step.once)
        k, v = ring.key_value.unbind(2)
        attended = segment_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            seen.visibility,
            bias=self.positions.bias(seen.tick, step.once),
            backend=self.backend,
        )
        out: Tensor = self.out(attended.flatten(1))
        return out

    def project(self, x: Tensor, part: str, *, frozen: bool) -> Tensor:
        """Project to queries, keys or values without positions (see :class:`memtx.memory.base.ContentAttention`)."""
        half = int(part == "value")
        layer = self.query if part == "query" else self.key_value
        if isinstance(layer, nn.Linear):
            weights = [one if part == "query" else one.chunk(2)[half] for one in layer.parameters()]
            out = linear(x, *(one.detach() if frozen else one for one in weights))
        else:
            # A module that adapts the map stands in its place, and gives keys and values together.
            out = _mapped(layer, x, frozen)
            out = out if part == "query" else out.chunk(2, dim=-1)[half]
        out = out.view(*out.shape[:-1], -1, self.head_dim)
        if part == "query":
            return _mapped(self.query_norm, out, frozen)
        out = _mapped(self.key_norm, out, frozen) if part == "key" else out
        return out.repeat_interleave(self.heads // self.kv_heads, dim=-2)

    def apart(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as a query without positions sees them (see :class:`memtx.memory.base.ContentAttention`)."""
        return self.positions.apart(keys, distance)

    def reset_parameters(self, std: float, residual_std: float) -> None:
        """Draw the projections; the memory's own parameters keep the values it gave them."""
        with torch.no_grad():
            for layer, width in ((self.query, std), (self.key_value, std), (self.out, residual_std)):
                nn.init.normal_(layer.weight, std=width)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _mapped(module: nn.Module, x: Tensor, frozen: bool) -> Tensor:
    """Return what a module makes of x, without letting its weights learn where frozen."""
    weights = {name: one.detach() for name, one in module.named_parameters()} if frozen else {}
    out: Tensor = torch.func.functional_call(module, weights, (x,)) if frozen else module(x)
    return out


def _check_order(memory: Memory[Any], beside: Sequence[Memory[Any]]) -> None:
    """Raise unless the first memory of a layer, and it alone, carries the segment."""
    if memory.answers:
        raise MemtxError(
            f"{type(memory).__name__} stands first in a layer, but it does not carry the segment itself.",
            "Put an exact memory before it: RecurrentMemory, CompressedMemory or NoMemory.",
        )
    for one in beside:
        if not one.answers:
            raise MemtxError(
                f"{type(one).__name__} stands behind another memory of its layer, but only the first is exact.",
                "Give it a layer of its own, or take it out.",
            )


def _check_width(dim: int, heads: int, head_dim: int, beside: Sequence[Memory[Any]]) -> None:
    """Raise where a memory's answers, dim wide over all heads, do not fit heads of another width."""
    for one in beside:
        if not one.by_layer:
            raise MemtxError(
                f"{type(one).__name__} answers {dim} wide, {heads} heads of {head_dim} are {heads * head_dim} wide.",
                "Use CompressedMemory, SinkMemory or TokenMemory, which read by the layer's own projections.",
            )
