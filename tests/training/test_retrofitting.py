"""Training of added memory: a frozen base, and sampled compression rates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from memtx.errors import MemtxError
from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import MeanPooling
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.memory.recurrent import RecurrentMemory
from memtx.memory.sinks import SinkMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.compression_rates import CompressionRateSampler
from memtx.training.language import LanguageModule
from tests.training.small import SEGMENT, adam, data, trainer

MEAN = partial(CompressedMemory, window=6, compression_rate=2, num_entries=8, compression=MeanPooling)


WINDOW = partial(RecurrentMemory, window=6)
HYBRID = (partial(GatedDeltaNet, heads=4), WINDOW)


def base(vocab_size: int = 257, layers: Sequence[Any] = (WINDOW,)) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(vocab_size, dim=16, depth=2, heads=2, memories=layers)


def retrofitted(vocab_size: int, *memories: Any, layers: Sequence[Any] = (WINDOW,)) -> MemoryTransformer:
    return base(vocab_size, layers).with_memory(
        memories or [partial(CompressedMemory, window=6, compression_rate=2, num_entries=8)], num_sinks=2
    )


def test_only_added_memory_is_trained(tmp_path: Path) -> None:
    language_module = LanguageModule(retrofitted, segment_length=SEGMENT, optimizer=adam, freeze_base=True)
    before = {name: tensor.clone() for name, tensor in language_module.model.state_dict().items()}
    trainer(tmp_path, max_steps=4).fit(language_module, data(tmp_path))
    added = language_module.model.memory_parameters()
    assert added
    for name, tensor in language_module.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in added), name


def test_a_frozen_model_without_memory_is_rejected() -> None:
    with pytest.raises(MemtxError, match="leaves nothing to train"):
        LanguageModule(base, freeze_base=True)


def test_a_rate_is_sampled_for_every_step_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    read = CompressedMemory.read

    def spy(self: CompressedMemory, *inputs: Any) -> Any:
        if self.training:
            seen.append((self.compression_rate, self.cache_length))
        return read(self, *inputs)

    monkeypatch.setattr(CompressedMemory, "read", spy)
    language_module = LanguageModule(partial(retrofitted), segment_length=SEGMENT, optimizer=adam, compression_rates=[])
    assert language_module.rate_sampler.rates == []
    language_module = LanguageModule(
        lambda size: retrofitted(size, MEAN), segment_length=SEGMENT, optimizer=adam, compression_rates=[1, 3, 4]
    )
    trainer(tmp_path, max_steps=12).fit(language_module, data(tmp_path))
    assert {rate for rate, _ in seen} == {1, 3, 4}
    assert {block.attention.memory.compression_rate for block in language_module.model.blocks} == {2}
    assert all(cached == 6 + rate - 1 for rate, cached in seen)


def test_sinks_exclude_the_cache_of_the_sampled_rate() -> None:
    model = retrofitted(11, MEAN)
    sampler = CompressionRateSampler(model, [5])
    sink = model.blocks[0].attention.extra_memories[0]
    assert isinstance(sink, SinkMemory)
    assert sink.exclude_recent == 7
    sampler.sample()
    assert sink.exclude_recent == 10
    sampler.restore_default()
    assert sink.exclude_recent == 7


def test_unsupported_rates_are_rejected() -> None:
    with pytest.raises(MemtxError, match="StridedConvolution, or its reconstruction loss, supports a single rate"):
        CompressionRateSampler(retrofitted(11), [2])
    with pytest.raises(MemtxError, match="the model has no CompressedMemory"):
        CompressionRateSampler(base(11), [2])
    with pytest.raises(MemtxError, match="rate is 0"):
        CompressionRateSampler(retrofitted(11, MEAN), [0])
