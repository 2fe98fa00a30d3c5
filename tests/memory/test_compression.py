"""Compressions: learned ones start as the mean and learn, and each is a function of its block alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.memory.compression import (
    AttentionPooling,
    Compression,
    DilatedConvolution,
    MaxPooling,
    MeanPooling,
    MostUsed,
    StridedConvolution,
)

DIM = 8
LEARNED: list[Callable[[int, int], Compression]] = [StridedConvolution, DilatedConvolution, AttentionPooling]
KINDS: list[Callable[[int, int], Compression]] = [MeanPooling, MaxPooling, MostUsed, *LEARNED]


def sample_blocks(rate: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rate)
    blocks = torch.randn(2, 3, rate, DIM, dtype=torch.float64, generator=generator)
    return blocks, torch.rand(2, 3, rate, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_compressions_start_as_the_mean(kind: Callable[[int, int], Compression], rate: int) -> None:
    blocks, _ = sample_blocks(rate)
    module: Any = kind(DIM, rate).double()
    module.reset_parameters()  # again in float64: 1/3 rounded to float32 is off by 1e-8
    torch.testing.assert_close(module(blocks), blocks.mean(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_depends_on_its_block_alone(kind: Callable[[int, int], Compression], rate: int) -> None:
    module, (blocks, usage) = kind(DIM, rate).double(), sample_blocks(rate)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        together = module(blocks, usage)
        alone = module(blocks[1:, 2:], usage[1:, 2:])
    assert together.shape == (2, 3, DIM)
    torch.testing.assert_close(alone, together[1:, 2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_compressions_train_away_from_the_mean(kind: Callable[[int, int], Compression]) -> None:
    """The target is the last state of the block, which the mean is not."""
    torch.manual_seed(0)
    module, (blocks, _) = kind(DIM, 4).double(), sample_blocks(4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses, moved = [], {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for _ in range(60):
        loss = (module(blocks) - blocks[:, :, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            moved[name] += parameter.grad.abs()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(total.max()) > 0 for total in moved.values()), "a weight never got a gradient"


@pytest.mark.parametrize("rate", [2, 3, 4, 5])
def test_dilated_convolution_reaches_the_whole_block(rate: int) -> None:
    """The convolved value of each state depends on every state of the block."""
    torch.manual_seed(0)
    module, (blocks, _) = DilatedConvolution(DIM, rate).double(), sample_blocks(rate)
    x = blocks.reshape(-1, rate, DIM).transpose(1, 2)[:1].requires_grad_()
    y = x
    for layer in module.layers:
        y = y + torch.nn.functional.gelu(layer(y))
    for position in range(rate):
        (gradient,) = torch.autograd.grad(y[..., position].sum(), x, retain_graph=True)
        assert bool((gradient.abs().sum(1) > 0).all())


def test_max_pooling_takes_the_maximum_of_each_channel() -> None:
    blocks, _ = sample_blocks(3)
    assert torch.equal(MaxPooling(DIM, 3)(blocks), torch.maximum(torch.maximum(*blocks.unbind(2)[:2]), blocks[:, :, 2]))


def test_most_used_selects_a_state_and_passes_its_gradient() -> None:
    blocks, usage = sample_blocks(4)
    blocks.requires_grad_()
    out = MostUsed(DIM, 4)(blocks, usage)
    for stream in range(2):
        for block in range(3):
            assert torch.equal(out[stream, block], blocks[stream, block, int(usage[stream, block].argmax())])
    (gradient,) = torch.autograd.grad(out.sum(), blocks)
    assert torch.equal(gradient.sum(2), torch.ones(2, 3, DIM, dtype=torch.float64))


def test_heads_of_attention_pooling_weigh_states_independently() -> None:
    module = partial(AttentionPooling, heads=2)(DIM, 3).double()
    blocks, _ = sample_blocks(3)
    with torch.no_grad():
        module.position_bias[0, 0], module.position_bias[1, 2] = 100.0, 100.0
    expected = torch.cat([blocks[:, :, 0, :4], blocks[:, :, 2, 4:]], -1)
    torch.testing.assert_close(module(blocks), expected, rtol=0, atol=1e-12)
