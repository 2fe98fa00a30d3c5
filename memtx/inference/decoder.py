"""Going on token by token, with keys and values kept: opened from a state, closed to one.

The decoder owns buffers that it writes in place, which a state, a value, must not have. On a GPU a step is captured
as a graph and replayed; shapes are fixed, so nothing is made twice as memory fills.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memory.ring import Layout, Step
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

WARM = 3
"""Steps on a side stream before a graph is captured, as CUDA asks for."""


class Decoder:
    """Reads one token a row at a time; results equal the model's calls of one token, up to rounding.

    A model with a memory that has no such form is called as it is.

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
        self._state = state
        # The host counts along, so that no step asks the device where it stands.
        self._read: list[int] = state.position.tolist()
        self._layouts: list[Layout] = list(dict.fromkeys(ring.layout for ring in self._rings or ()))
        self._compile = compile
        self._runs: dict[frozenset[Layout], Callable[[Tensor], Tensor]] = {}
        cuda = state.position.device.type == "cuda"
        self._graph = cuda and not compile if graph is None else graph
        if self._graph and not cuda:
            raise MemtxError(f"graph=True on {state.position.device}.", "CUDA graphs need a GPU; leave it out.")

    @property
    def state(self) -> MemoryState:
        """Where the stream stands, as a value."""
        if self._rings is None:
            return self._state
        with torch.inference_mode():
            return self.model.close(self._rings, self._position)

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
        if self._rings is None:
            output = self.model(tokens[:, None], self._state)
            self._state = output.state
            assert output.logits is not None
            last: Tensor = output.logits[:, 0]
            return last
        crossing = frozenset(one for one in self._layouts if any(one.crosses(read) for read in self._read))
        if crossing not in self._runs:
            self._runs[crossing] = self._made(crossing, tokens)
        logits = self._runs[crossing](tokens)
        self._read = [read + 1 for read in self._read]
        return logits

    def _made(self, crossing: frozenset[Layout], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a step in which blocks cross the edge in these layouts."""

        def run(tokens: Tensor) -> Tensor:
            assert self._rings is not None
            logits = self.model.step(tokens, self._rings, Step(self._position, crossing))
            self._position.add_(1)
            return logits

        if self._compile:
            backend = "inductor" if self._compile is True else self._compile
            compiled: Callable[[Tensor], Tensor] = torch.compile(run, backend=backend, dynamic=False)
            return compiled
        return self._captured(run, tokens) if self._graph else run

    def _captured(self, run: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the step as a graph's replay. It is run some times before, so what it writes is put back."""
        assert self._rings is not None
        buffers = [self._position, *(buffer for ring in self._rings for buffer in (ring.hidden, ring.key_value))]
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
