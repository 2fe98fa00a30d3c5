"""Compression rates sampled for every step, so that one model serves many (Activation Beacon, Zhang et al. 2024).

As in section 3.3 there, each step samples a rate from a set. Blocks differ between rates, so every step starts with
fresh streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from memtx.errors import MemtxError, check_at_least
from memtx.layers.attention import MemoryAttention
from memtx.memory.compressed import CompressedMemory
from memtx.memory.sinks import SinkMemory


class CompressionRateSampler:
    """Sets a random compression rate in all compressed memories of a model.

    Args:
        model: Model with ``CompressedMemory`` in its layers.
        rates: Positions per entry to sample from. If empty, the model keeps its own rates.

    Raises:
        MemtxError: A rate is not positive, or a memory supports a single rate.
    """

    def __init__(self, model: nn.Module, rates: Sequence[int]) -> None:
        for rate in rates:
            check_at_least(1, rate=rate)
        self.rates = list(rates)
        self._default_rates = [
            (module, module.memory, module.memory.compression_rate)
            for module in (model.modules() if self.rates else ())
            if isinstance(module, MemoryAttention) and isinstance(module.memory, CompressedMemory)
        ]
        if self.rates and not self._default_rates:
            raise MemtxError(
                f"compression_rates is {self.rates}, but the model has no CompressedMemory.",
                "Remove compression_rates.",
            )
        for _, memory, _ in self._default_rates:
            if not memory.compression.supports_any_rate or memory.reconstruction is not None:
                raise MemtxError(
                    f"compression_rates is {self.rates}, but {type(memory.compression).__name__}, or its "
                    "reconstruction loss, supports a single rate.",
                    "Use MeanPooling, MaxPooling or MostUsed without a reconstruction loss.",
                )

    def sample(self) -> None:
        """Set a rate for the next step, sampled with torch's default generator, whose state checkpoints contain."""
        if self.rates:
            rate = self.rates[int(torch.randint(len(self.rates), ()))]
            for attention, memory, _ in self._default_rates:
                _set_rate(attention, memory, rate)

    def restore_default(self) -> None:
        """Set the model's own rates."""
        for attention, memory, rate in self._default_rates:
            _set_rate(attention, memory, rate)


def _set_rate(attention: MemoryAttention, memory: CompressedMemory, rate: int) -> None:
    for extra in attention.extra_memories:
        # Sinks begin where the exact states end.
        if isinstance(extra, SinkMemory) and extra.exclude_recent == memory.cache_length:
            extra.exclude_recent = memory.window + rate - 1
    memory.compression_rate = rate
