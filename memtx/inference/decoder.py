"""Going on token by token, with keys and values kept: opened from a state, closed to one.

The decoder owns buffers that it writes in place, which a state, a value, must not have. On a GPU a step is captured
as a graph and replayed; shapes are fixed, so nothing is made twice as memory fills. Rows come and go while the others
go on: a row that joins is written behind the last one, into buffers that double when they are full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.memory.kv_ring import DecodeStep, RingLayout
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

WARMUP_STEPS = 3
"""Steps on a side stream before a graph is captured, as CUDA asks for."""


class Decoder:
    """Reads one token a row at a time; results equal the model's calls of one token, up to rounding.

    Rows stand at positions of their own, and may join and leave between steps. A model with a memory that has no such
    form is called as it is.

    Args:
        model: put into eval mode.
        state: where to begin; stays as it is.
        torch_compile: whether to run a step through ``torch.compile``, or by which of its backends; it is compiled once
            for the steps at which a block is compressed and once for the others.
        use_cuda_graph: whether to capture a step as a CUDA graph; by default on a GPU, unless compiled.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        state: MemoryState,
        *,
        torch_compile: bool | Callable[..., Any] = False,
        use_cuda_graph: bool | None = None,
    ) -> None:
        self.model = model.eval()
        with torch.inference_mode():
            self._rings = model.to_rings(state)
            self._position = state.position.clone()
        # Needed where the model is called as it is; rings hold what it held.
        self._state = state if self._rings is None else None
        self._capacity = state.batch_size
        # The host counts along, so that no step asks the device where it stands.
        self._host_positions: list[int] = state.position.tolist()
        self._layouts: list[RingLayout] = list(dict.fromkeys(ring.layout for ring in self._rings or ()))
        self._torch_compile = torch_compile
        self._step_fns: dict[tuple[frozenset[RingLayout], int], Callable[[Tensor], Tensor]] = {}
        cuda = state.position.device.type == "cuda"
        self._use_cuda_graph = cuda and not torch_compile if use_cuda_graph is None else use_cuda_graph
        if self._use_cuda_graph and not cuda:
            raise MemtxError(
                f"use_cuda_graph=True on {state.position.device}.", "CUDA graphs need a GPU; leave it out."
            )

    @property
    def batch_size(self) -> int:
        """Streams that go on now."""
        return len(self._host_positions)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._position.device

    @property
    def state(self) -> MemoryState:
        """Where the streams stand, as a value."""
        if self._state is not None:
            return self._state
        assert self._rings is not None
        with torch.inference_mode():
            return self.model.from_rings(
                [ring.narrow(self.batch_size) for ring in self._rings], self._position[: self.batch_size]
            )

    @torch.inference_mode()
    def append(self, state: MemoryState) -> None:
        """Add the rows of a state behind the others.

        Args:
            state: of the same model, at any positions; stays as it is.
        """
        held, needed = self.batch_size, self.batch_size + state.batch_size
        if self._state is not None:
            self._state = MemoryState.concat([self._state, state])
        else:
            assert self._rings is not None
            opened = self.model.to_rings(state)
            assert opened is not None
            if needed > self._capacity:
                self._grow(max(needed, 2 * self._capacity))
            for ring, new in zip(self._rings, opened, strict=True):
                ring.copy_from(held, new)
            self._position[held:needed] = state.position
        self._host_positions += state.position.tolist()

    @torch.inference_mode()
    def select(self, indices: Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row that keeps its place costs nothing.

        Args:
            indices: numbers from 0, each at most once; none leaves a decoder that rows can join.

        Raises:
            MemtxError: a number is out of range or stands twice.
        """
        if len(set(indices)) != len(indices) or not all(0 <= row < self.batch_size for row in indices):
            raise MemtxError(
                f"select got {list(indices)} of {self.batch_size} rows.", "Give each row number at most once."
            )
        if self._state is not None:
            self._state = self._state.select(torch.tensor(indices, dtype=torch.int64))
        elif moved := [(row, at) for at, row in enumerate(indices) if row != at]:
            sources, targets = torch.tensor(moved, device=self._position.device).unbind(1)
            for ring in self._rings or ():
                ring.compact(sources, targets)
            self._position[targets] = self._position[sources]
        self._host_positions = [self._host_positions[row] for row in indices]

    def _grow(self, capacity: int) -> None:
        assert self._rings is not None
        self._rings = [ring.resized(capacity) for ring in self._rings]
        position = self._position.new_zeros(capacity)
        position[: self.batch_size] = self._position[: self.batch_size]
        self._position, self._capacity = position, capacity
        # What was captured writes into the old buffers.
        self._step_fns.clear()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of every row.

        Args:
            tokens: (batch,) int64.

        Returns:
            (batch, vocab) logits of the next ones.

        Raises:
            MemtxError: not one token a row.
        """
        if tokens.shape != (len(self._host_positions),):
            raise MemtxError(
                f"tokens is {tuple(tokens.shape)}, expected ({len(self._host_positions)},).",
                "Give one token for every row.",
            )
        if not self._host_positions:
            return torch.empty(0, self.model.vocab_size, device=tokens.device)
        if self._state is not None:
            output = self.model(tokens[:, None], self._state)
            self._state = output.state
            assert output.logits is not None
            last: Tensor = output.logits[:, 0]
            return last
        rows, width = self.batch_size, self._padded_batch_size()
        crossing = frozenset(
            one for one in self._layouts if any(one.evicts_block(read) for read in self._host_positions)
        )
        if width > rows:
            tokens = nn.functional.pad(tokens, (0, width - rows))
        if (crossing, width) not in self._step_fns:
            self._step_fns[crossing, width] = self._build_step(crossing, tokens)
        logits = self._step_fns[crossing, width](tokens)
        self._host_positions = [read + 1 for read in self._host_positions]
        return logits[:rows]

    def _padded_batch_size(self) -> int:
        """Return how many rows a step computes: where one is made for each width, only powers of two."""
        if not (self._use_cuda_graph or self._torch_compile):
            return self.batch_size
        return min(1 << (self.batch_size - 1).bit_length(), self._capacity)

    def _build_step(self, crossing_layouts: frozenset[RingLayout], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a step in which blocks cross the edge in these layouts."""
        assert self._rings is not None
        rings, position = [ring.narrow(len(tokens)) for ring in self._rings], self._position[: len(tokens)]

        def run(tokens: Tensor) -> Tensor:
            logits = self.model.decode_step(tokens, rings, DecodeStep(position, crossing_layouts))
            position.add_(1)
            return logits

        if self._torch_compile:
            backend = "inductor" if self._torch_compile is True else self._torch_compile
            compiled: Callable[[Tensor], Tensor] = torch.compile(run, backend=backend, dynamic=False)
            return compiled
        buffers = [position, *(buffer for ring in rings for buffer in (ring.hidden, ring.key_value))]
        return _capture_graph(run, tokens, buffers) if self._use_cuda_graph else run


def _capture_graph(
    step_fn: Callable[[Tensor], Tensor], tokens: Tensor, buffers: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return a step as a graph's replay. It is run some times before, so what it writes is put back."""
    before = [buffer.clone() for buffer in buffers]
    given, graph = tokens.clone(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_STEPS):
            step_fn(given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = step_fn(given)
    for buffer, kept in zip(buffers, before, strict=True):
        buffer.copy_(kept)

    def replay(tokens: Tensor) -> Tensor:
        given.copy_(tokens)
        graph.replay()
        return logits.clone()

    return replay
