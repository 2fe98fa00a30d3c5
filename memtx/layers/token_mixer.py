"""The place of attention in a block, taken by a memory that makes the layer's output by itself."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx.layers.feed_forward import reset_linear
from memtx.memory.base import Losses, Memory
from memtx.memory.kv_ring import DecodeBuffers, DecodeStep
from memtx.segment import Segment


@runtime_checkable
class StandaloneMemory(Protocol):
    """A memory that replaces attention in its layer.

    Attributes:
        heads: Heads of the values.
        value_dim: Width of a head's values.
    """

    heads: int
    value_dim: int

    def mix(self, state: Any, x: Tensor, segment: Segment) -> tuple[Tensor, Any]:
        """Return the layer's output for normalized inputs x, both ``(batch, length, dim)``, and the next state."""

    def step(self, x: Tensor, state: Any) -> Tensor:
        """Return the layer's output ``(batch, dim)`` for one token per stream; the state is changed in place."""

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of inputs x, ``(batch, length, heads * value_dim)``."""


class TokenMixer(nn.Module):
    """A layer's only memory in place of attention; has the methods of :class:`memtx.layers.attention.MemoryAttention`.

    Args:
        memory: A :class:`StandaloneMemory`.
    """

    needs_layer_output = False

    def __init__(self, memory: Memory[Any]) -> None:
        super().__init__()
        # Not "memory", which names the parameters that a trained model is given beside its own.
        self.mixer = memory

    @property
    def memory(self) -> Memory[Any]:
        """The memory."""
        return self.mixer

    @property
    def memories(self) -> tuple[Memory[Any], ...]:
        """The memory."""
        return (self.mixer,)

    @property
    def heads(self) -> int:
        """Heads of the values."""
        return self._standalone.heads

    @property
    def head_dim(self) -> int:
        """Width of a head's values."""
        return self._standalone.value_dim

    @property
    def _standalone(self) -> StandaloneMemory:
        return cast("StandaloneMemory", self.mixer)

    def forward(self, x: Tensor, state: tuple[Any, ...], segment: Segment) -> tuple[Tensor, tuple[Any, ...], Losses]:
        """Return the output for x, both ``(batch, length, dim)``, the next state and no losses."""
        past = self.mixer.init_state(x.shape[0], like=x) if self.mixer.is_hidden else state[0]
        out, next_state = self._standalone.mix(past, x, segment)
        return out, (next_state,), {}

    def open_ring(self, state: tuple[Any, ...], past_length: Tensor) -> DecodeBuffers | None:
        """Return the buffers of the state, which is copied; None if the state is hidden."""
        if self.mixer.is_hidden:
            return None
        leaves, spec = pytree.tree_flatten(state[0])
        return DecodeBuffers(tuple(leaf.clone() for leaf in leaves), structure=spec)

    def close_ring(self, ring: DecodeBuffers, past_length: Tensor) -> tuple[Any, ...]:
        """Return a copy of the state in the buffers."""
        return (pytree.tree_unflatten([buffer.clone() for buffer in ring.buffers], ring.structure),)

    def step(self, x: Tensor, ring: DecodeBuffers, step: DecodeStep) -> Tensor:
        """Return the output ``(batch, dim)`` for normalized inputs x of one token per stream."""
        return self._standalone.step(x, pytree.tree_unflatten(list(ring.buffers), ring.structure))

    def project_values(self, x: Tensor) -> Tensor:
        """Return the values of normalized inputs x before the convolution, ``(batch, length, heads * value_dim)``."""
        return self._standalone.project_values(x)

    def reset_parameters(self, std: float, residual_std: float) -> None:
        """Initialize the linear layers; other parameters stay as the memory's constructor set them."""
        reset_linear(self.mixer, std, residual_std)
