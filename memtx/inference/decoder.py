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
from memtx.memory.ring import Layout, Step
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

WARM = 3
"""Steps on a side stream before a graph is captured, as CUDA asks for."""


class Decoder:
    """Reads one token a row at a time; results equal the model's calls of one token, up to rounding.

    Rows stand at positions of their own, and may join and leave between steps. A model with a memory that has no such
    form is called as it is.

    Args:
        model: put into eval mode.
        state: where to begin; stays as it is.
        compile: whether to run a step through ``torch.compile``, or by which of its backends; it is compiled once
            for the steps at which a block is compressed and once for the others.
        graph: whether to capture a step as a CUDA graph; by default on a GPU, unless compiled.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        state: MemoryState,
        *,
        compile: bool | Callable[..., Any] = False,
        graph: bool | None = None,
    ) -> None:
        self.model = model.eval()
        with torch.inference_mode():
            self._rings = model.rings(state)
            self._position = state.position.clone()
        # Needed where the model is called as it is; rings hold what it held.
        self._state = state if self._rings is None else None
        self._capacity = state.rows
        # The host counts along, so that no step asks the device where it stands.
        self._read: list[int] = state.position.tolist()
        self._layouts: list[Layout] = list(dict.fromkeys(ring.layout for ring in self._rings or ()))
        self._compile = compile
        self._runs: dict[tuple[frozenset[Layout], int], Callable[[Tensor], Tensor]] = {}
        cuda = state.position.device.type == "cuda"
        self._graph = cuda and not compile if graph is None else graph
        if self._graph and not cuda:
            raise MemtxError(f"graph=True on {state.position.device}.", "CUDA graphs need a GPU; leave it out.")

    @property
    def rows(self) -> int:
        """Streams that go on now."""
        return len(self._read)

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
            return self.model.close([ring.first(self.rows) for ring in self._rings], self._position[: self.rows])

    @torch.inference_mode()
    def join(self, state: MemoryState) -> None:
        """Add the rows of a state behind the others.

        Args:
            state: of the same model, at any positions; stays as it is.
        """
        held, needed = self.rows, self.rows + state.rows
        if self._state is not None:
            self._state = MemoryState.concat([self._state, state])
        else:
            assert self._rings is not None
            opened = self.model.rings(state)
            assert opened is not None
            if needed > self._capacity:
                self._grow(max(needed, 2 * self._capacity))
            for ring, new in zip(self._rings, opened, strict=True):
                ring.put(held, new)
            self._position[held:needed] = state.position
        self._read += state.position.tolist()

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; a row that keeps its place costs nothing.

        Args:
            rows: numbers from 0, each at most once; none leaves a decoder that rows can join.

        Raises:
            MemtxError: a number is out of range or stands twice.
        """
        if len(set(rows)) != len(rows) or not all(0 <= row < self.rows for row in rows):
            raise MemtxError(f"select got {list(rows)} of {self.rows} rows.", "Give each row number at most once.")
        if self._state is not None:
            self._state = self._state.select(torch.tensor(rows, dtype=torch.int64))
        elif moved := [(row, at) for at, row in enumerate(rows) if row != at]:
            sources, targets = torch.tensor(moved, device=self._position.device).unbind(1)
            for ring in self._rings or ():
                ring.move(sources, targets)
            self._position[targets] = self._position[sources]
        self._read = [self._read[row] for row in rows]

    def _grow(self, rows: int) -> None:
        assert self._rings is not None
        self._rings = [ring.grown(rows) for ring in self._rings]
        position = self._position.new_zeros(rows)
        position[: self.rows] = self._position[: self.rows]
        self._position, self._capacity = position, rows
        # What was captured writes into the old buffers.
        self._runs.clear()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of every row.

        Args:
            tokens: (rows,) int64.

        Returns:
            (rows, vocab) logits of the next ones.

        Raises:
            MemtxError: not one token a row.
        """
        if tokens.shape != (len(self._read),):
            raise MemtxError(
                f"tokens is {tuple(tokens.shape)}, expected ({len(self._read)},).", "Give one token for every row."
            )
        if not self._read:
            return torch.empty(0, self.model.vocab_size, device=tokens.device)
        if self._state is not None:
            output = self.model(tokens[:, None], self._state)
            self._state = output.state
            assert output.logits is not None
            last: Tensor = output.logits[:, 0]
            return last
        rows, width = self.rows, self._width()
        crossing = frozenset(one for one in self._layouts if any(one.crosses(read) for read in self._read))
        if width > rows:
            tokens = nn.functional.pad(tokens, (0, width - rows))
        if (crossing, width) not in self._runs:
            self._runs[crossing, width] = self._made(crossing, tokens)
        logits = self._runs[crossing, width](tokens)
        self._read = [read + 1 for read in self._read]
        return logits[:rows]

    def _width(self) -> int:
        """Return how many rows a step computes: where one is made for each width, only powers of two."""
        if not (self._graph or self._compile):
            return self.rows
        return min(1 << (self.rows - 1).bit_length(), self._capacity)

    def _made(self, crossing: frozenset[Layout], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a step in which blocks cross the edge in these layouts."""
        assert self._rings is not None
        rings, position = [ring.first(len(tokens)) for ring in self._rings], self._position[: len(tokens)]

        def run(tokens: Tensor) -> Tensor:
            logits = self.model.step(tokens, rings, Step(position, crossing))
            position.add_(1)
            return logits

        if self._compile:
            backend = "inductor" if self._compile is True else self._compile
            compiled: Callable[[Tensor], Tensor] = torch.compile(run, backend=backend, dynamic=False)
            return compiled
        buffers = [position, *(buffer for ring in rings for buffer in (ring.hidden, ring.key_value))]
        return _captured(run, tokens, buffers) if self._graph else run


def _captured(run: Callable[[Tensor], Tensor], tokens: Tensor, buffers: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a step as a graph's replay. It is run some times before, so what it writes is put back."""
    before = [buffer.clone() for buffer in buffers]
    given, graph = tokens.clone(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run(given)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = run(given)
    for buffer, kept in zip(buffers, before, strict=True):
        buffer.copy_(kept)

    def replay(tokens: Tensor) -> Tensor:
        given.copy_(tokens)
        graph.replay()
        return logits.clone()

    return replay
