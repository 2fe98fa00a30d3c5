"""A compression rate drawn anew for every step, so that one model serves many (Activation Beacon, Zhang et al. 2024).

There (section 3.3) the ratio of a step is drawn from a set; here too. The blocks of another rate are other blocks, so a
step begins with fresh streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from memtx.errors import MemtxError, check_at_least
from memtx.layers.attention import MemoryAttention
from memtx.memory.compressed import CompressedMemory
from memtx.memory.sinks import SinkMemory
from memtx.models.memory_transformer import MemoryTransformer


class CompressionRateSampler:
    """Draws the rate of a model's compressed memories.

    Args:
        model: the model.
        rates: positions an entry stands for, one of which is drawn a step; empty for the model's own always.

    Raises:
        MemtxError: a rate is not positive, or a compression is made for one rate alone.
    """

    def __init__(self, model: MemoryTransformer, rates: Sequence[int]) -> None:
        for rate in rates:
            check_at_least(1, rate=rate)
        self.rates = list(rates)
        # Not attributes of the module that trains: they are the model's.
        self.default_rates = [(attention, memory.compression_rate) for attention, memory in _compressed_memories(model)]
        if not self.rates:
            return
        if not self.default_rates:
            raise MemtxError(
                "compression_rates are to be drawn for a model without CompressedMemory.",
                "Leave compression_rates out.",
            )
        for _, memory in _compressed_memories(model):
            if not memory.compression.supports_any_rate or memory.reconstruction is not None:
                raise MemtxError(
                    "compression_rates are to be drawn, but "
                    f"{type(memory.compression).__name__} is made for one alone.",
                    "Use MeanPooling, MaxPooling or MostUsed, without a reconstruction loss.",
                )

    def sample(self) -> None:
        """Take a rate for the next step, from torch's generator, which checkpoints keep."""
        if self.rates:
            rate = self.rates[int(torch.randint(len(self.rates), ()))]
            for attention, _ in self.default_rates:
                _set_rate(attention, rate)

    def restore_default(self) -> None:
        """Go back to the model's own."""
        for attention, rate in self.default_rates if self.rates else ():
            _set_rate(attention, rate)


def _compressed_memories(model: MemoryTransformer) -> Iterator[tuple[MemoryAttention, CompressedMemory]]:
    for module in model.modules():
        if isinstance(module, MemoryAttention) and isinstance(module.memory, CompressedMemory):
            yield module, module.memory


def _set_rate(attention: MemoryAttention, rate: int) -> None:
    memory = attention.memory
    assert isinstance(memory, CompressedMemory)
    for one in attention.extra_memories:
        # Sinks begin where the exact states end.
        if isinstance(one, SinkMemory) and one.exclude_recent == memory.cache_length:
            one.exclude_recent = memory.window + rate - 1
    memory.compression_rate = rate
