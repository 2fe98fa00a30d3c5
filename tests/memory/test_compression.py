"""Compressions: learned ones begin as the mean, all learn, and each is a function of its block alone."""

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


def drawn(rate: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rate)
    blocks = torch.randn(2, 3, rate, DIM, dtype=torch.float64, generator=generator)
    return blocks, torch.rand(2, 3, rate, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_ones_begin_as_the_mean(kind: Callable[[int, int], Compression], rate: int) -> None:
    blocks, _ = drawn(rate)
    module: Any = kind(DIM, rate).double()
    module.reset_parameters()  # again in float64: 1/3 rounded to float32 is off by 1e-8
    torch.testing.assert_close(module(blocks), blocks.mean(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_alone_gives_what_it_gives_among_others(kind: Callable[[int, int], Compression], rate: int) -> None:
    module, (blocks, usage) = kind(DIM, rate).double(), drawn(rate)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        together = module(blocks, usage)
        alone = module(blocks[1:, 2:], usage[1:, 2:])
    assert together.shape == (2, 3, DIM)
    torch.testing.assert_close(alone, together[1:, 2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNED)
def test_learned_ones_leave_the_mean_under_training(kind: Callable[[int, int], Compression]) -> None:
    """Learning to give the block's last state, which the mean does not."""
    torch.manual_seed(0)
    module, (blocks, _) = kind(DIM, 4).double(), drawn(4)
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
    """Every state of the block is within reach of every other's convolved value."""
    torch.manual_seed(0)
    module, (blocks, _) = DilatedConvolution(DIM, rate).double(), drawn(rate)
    x = blocks.reshape(-1, rate, DIM).transpose(1, 2)[:1].requires_grad_()
    y = x
    for layer in module.layers:
        y = y + torch.nn.functional.gelu(layer(y))
    for place in range(rate):
        (gradient,) = torch.autograd.grad(y[..., place].sum(), x, retain_graph=True)
        assert bool((gradient.abs().sum(1) > 0).all())


def test_max_pooling() -> None:
    blocks, _ = drawn(3)
    assert torch.equal(MaxPooling(DIM, 3)(blocks), torch.maximum(torch.maximum(*blocks.unbind(2)[:2]), blocks[:, :, 2]))


def test_most_used_selects_and_passes_the_gradient() -> None:
    blocks, usage = drawn(4)
    blocks.requires_grad_()
    out = MostUsed(DIM, 4)(blocks, usage)
    for row in range(2):
        for block in range(3):
            assert torch.equal(out[row, block], blocks[row, block, int(usage[row, block].argmax())])
    (gradient,) = torch.autograd.grad(out.sum(), blocks)
    assert torch.equal(gradient.sum(2), torch.ones(2, 3, DIM, dtype=torch.float64))


def test_learned_queries_heads_weigh_apart() -> None:
    module = partial(AttentionPooling, heads=2)(DIM, 3).double()
    blocks, _ = drawn(3)
    with torch.no_grad():
        module.position_bias[0, 0], module.position_bias[1, 2] = 100.0, 100.0
    truth = torch.cat([blocks[:, :, 0, :4], blocks[:, :, 2, 4:]], -1)
    torch.testing.assert_close(module(blocks), truth, rtol=0, atol=1e-12)
