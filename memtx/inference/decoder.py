"""Token-by-token decoding in place: a state is copied into key-value buffers of fixed shape, which each step updates.

On a GPU, a step is captured as a CUDA graph and replayed. New streams are appended; full buffers double in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.memory.kv_ring import DecodeBuffers, DecodeStep, KVRing, RingLayout
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.state import MemoryState


class Decoder:
    """Decodes a batch of streams one token at a time; equals calling the model with one token, up to rounding.

    Streams may be at different positions, and may join and leave between steps. A model without rings is called
    instead.

    Args:
        model: Language model; a module is put into eval mode.
        state: Initial state; it is left unchanged.
        torch_compile: If True, or a backend of ``torch.compile``, compile the step: once for steps that compress a
            block, and once for all others.
        use_cuda_graph: If True, capture the step as a CUDA graph; raises MemtxError without a GPU. Defaults to True on
            a GPU, unless compiled.
    """

    def __init__(
        self,
        model: RecurrentLanguageModel,
        state: MemoryState,
        *,
        torch_compile: bool | Callable[..., Any] = False,
        use_cuda_graph: bool | None = None,
    ) -> None:
        if isinstance(model, nn.Module):
            model.eval()
        self.model = model
        self._rings: list[DecodeBuffers] = []
        # Exactly one of the two is None: streams are held as a state or in the model's rings.
        self._state: MemoryState | None = state
        self._ring_model: MemoryTransformer | None = None
        with torch.inference_mode():
            self._position = state.position.clone()
            if isinstance(model, MemoryTransformer) and (rings := model.to_rings(state)) is not None:
                self._ring_model, self._rings, self._state = model, rings, None
        self._capacity = state.batch_size
        # A copy on the host, so that no step waits for the device.
        self._host_positions: list[int] = state.position.tolist()
        self._layouts: list[RingLayout] = list(
            dict.fromkeys(ring.layout for ring in self._rings if isinstance(ring, KVRing))
        )
        self._torch_compile = torch_compile
        self._step_fns: dict[tuple[frozenset[RingLayout], int], Callable[[Tensor], Tensor]] = {}
        is_cuda = state.position.device.type == "cuda"
        self._graph_pool: Any = None  # one pool of memory for all captured steps
        self._use_cuda_graph = is_cuda and not torch_compile if use_cuda_graph is None else use_cuda_graph
        if self._use_cuda_graph and not is_cuda:
            device = state.position.device
            raise MemtxError(f"use_cuda_graph=True needs a GPU; the state is on {device}.", "Remove use_cuda_graph.")

    @property
    def batch_size(self) -> int:
        """Number of streams."""
        return len(self._host_positions)

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self._position.device

    @property
    def state(self) -> MemoryState:
        """State of the streams, as a value."""
        if self._state is not None:
            return self._state
        assert self._ring_model is not None
        with torch.inference_mode():
            rings = [ring.narrow(self.batch_size) for ring in self._rings]
            return self._ring_model.from_rings(rings, self._position[: self.batch_size])

    @torch.inference_mode()
    def append(self, state: MemoryState) -> None:
        """Append the streams of ``state``, which is left unchanged."""
        if self._ring_model is None:
            self._state = MemoryState.concat([self.state, state])
        else:
            start, end = self.batch_size, self.batch_size + state.batch_size
            new_rings = self._ring_model.to_rings(state)
            assert new_rings is not None
            if end > self._capacity:
                self._grow(max(end, 2 * self._capacity))
            for ring, new_ring in zip(self._rings, new_rings, strict=True):
                ring.copy_from(start, new_ring)
            self._position[start:end] = state.position
        self._host_positions += state.position.tolist()

    @torch.inference_mode()
    def select(self, indices: Sequence[int]) -> None:
        """Keep the streams at ``indices``, in this order; a stream that keeps its index is not copied.

        Raises MemtxError if an index is out of range or occurs twice.
        """
        if len(set(indices)) != len(indices) or not all(0 <= index < self.batch_size for index in indices):
            message = f"select got {list(indices)} for {self.batch_size} streams."
            raise MemtxError(message, "Give each index at most once.")
        if self._state is not None:
            self._state = self._state.select(torch.tensor(indices, dtype=torch.int64))
        elif moves := [(source, target) for target, source in enumerate(indices) if source != target]:
            sources, targets = torch.tensor(moves, device=self.device).unbind(1)
            for ring in self._rings:
                ring.compact(sources, targets)
            self._position[targets] = self._position[sources]
        self._host_positions = [self._host_positions[index] for index in indices]

    @torch.inference_mode()
    def reorder(self, indices: Tensor) -> None:
        """Replace each stream by the one at its index, ``(batch,)`` int64; an index may occur twice, as in a beam."""
        if self._state is not None:
            self._state = self._state.select(indices)
        else:
            for ring in self._rings:
                ring.compact(indices, torch.arange(self.batch_size, device=indices.device))
            self._position[: self.batch_size] = self._position[indices]
        self._host_positions = [self._host_positions[index] for index in indices.tolist()]

    def _grow(self, capacity: int) -> None:
        self._rings = [ring.resized(capacity) for ring in self._rings]
        position = self._position.new_zeros(capacity)
        position[: self.batch_size] = self._position[: self.batch_size]
        self._position, self._capacity = position, capacity
        # Captured steps write into the old buffers; their pool is freed with them.
        self._step_fns.clear()
        self._graph_pool = None

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per stream, ``(batch,)`` int64, and return the logits of the next, ``(batch, vocab)``.

        Raises MemtxError if ``tokens`` has another shape.
        """
        batch_size = self.batch_size
        if tokens.shape != (batch_size,):
            message = f"tokens is {tuple(tokens.shape)}, expected ({batch_size},)."
            raise MemtxError(message, "Give one token per stream.")
        if not batch_size:
            return torch.empty(0, self.model.vocab_size, device=tokens.device)
        if self._state is not None:
            output = self.model(tokens[:, None], self._state)
            self._state = output.state
            assert output.logits is not None
            return output.logits[:, 0]
        evicting = frozenset(layout for layout in self._layouts if any(map(layout.evicts_block, self._host_positions)))
        padded_size = batch_size
        if self._use_cuda_graph or self._torch_compile:
            # A step is captured or compiled per batch size, so only powers of two are used.
            padded_size = min(1 << (batch_size - 1).bit_length(), self._capacity)
        if padded_size > batch_size:
            tokens = nn.functional.pad(tokens, (0, padded_size - batch_size))
        if (evicting, padded_size) not in self._step_fns:
            self._step_fns[evicting, padded_size] = self._build_step(evicting, tokens)
        logits = self._step_fns[evicting, padded_size](tokens)
        self._host_positions = [position + 1 for position in self._host_positions]
        return logits[:batch_size]

    def _build_step(self, evicting_layouts: frozenset[RingLayout], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Build a step in which rings with these layouts evict a block."""
        model = self._ring_model
        assert model is not None
        rings, position = [ring.narrow(len(tokens)) for ring in self._rings], self._position[: len(tokens)]

        def step_fn(tokens: Tensor) -> Tensor:
            logits = model.decode_step(tokens, rings, DecodeStep(position, evicting_layouts))
            position.add_(1)
            return logits

        if self._torch_compile:
            backend = "inductor" if self._torch_compile is True else self._torch_compile
            compiled: Callable[[Tensor], Tensor] = torch.compile(step_fn, backend=backend, dynamic=False)
            return compiled
        if not self._use_cuda_graph:
            return step_fn
        self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
        return _capture_graph(step_fn, tokens, position, rings, self._graph_pool)


def _capture_graph(
    step_fn: Callable[[Tensor], Tensor], tokens: Tensor, position: Tensor, rings: Sequence[DecodeBuffers], pool: Any
) -> Callable[[Tensor], Tensor]:
    """Capture a step as a CUDA graph; the slots that the warmup overwrites are restored."""
    start, restores = position.clone(), [ring.snapshot(position) for ring in rings]
    static_tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
    side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):  # Required by CUDA before a capture.
            step_fn(static_tokens)
            position.copy_(start)
        for restore in restores:
            restore()
    torch.cuda.current_stream().wait_stream(side_stream)
    # In a server, other threads allocate meanwhile: only this thread's calls may not.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits = step_fn(static_tokens)

    def replay(tokens: Tensor) -> Tensor:
        static_tokens.copy_(tokens)
        graph.replay()
        return logits.clone()

    return replay
