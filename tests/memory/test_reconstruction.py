"""Reconstruction losses teach the compression (and its decoder) and nothing else, and freeze nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memtx.memory.compressed import CompressedMemory
from memtx.memory.compression import AttentionReconstruction, AutoEncoding, MostUsed, StridedConvolution
from tests.memory.harness import DIM, HEADS, Layer, Stack

WINDOW, RATE, LENGTH = 4, 2, 3
LOSSES = [AutoEncoding, AttentionReconstruction]


def stack_of(reconstruction: Any, compression: Any = StridedConvolution) -> Stack:
    torch.manual_seed(0)
    return Stack(
        partial(
            CompressedMemory,
            window=WINDOW,
            compression_rate=RATE,
            num_entries=LENGTH,
            compression=compression,
            reconstruction=reconstruction,
        )
    )


def read(stack: Stack, n: int = 12) -> tuple[Tensor, Tensor]:
    """Output, and the sum of the auxiliary losses, of inputs that want a gradient themselves."""
    x = torch.randn(2, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    starts = torch.zeros(2, n, dtype=torch.bool)
    starts[1, 7] = True  # row 1 has fewer blocks than row 0
    out, _, losses = stack.step(x, stack.init_state(2), starts)
    assert all(len(one) == 1 for one in losses)
    auxiliary = torch.stack([value for one in losses for value in one.values()]).sum()
    auxiliary.backward(retain_graph=True)
    assert x.grad is None or not x.grad.any(), "the loss reached the inputs"
    return out, auxiliary


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_compression_learns_from_it(kind: Any) -> None:
    stack = stack_of(kind)
    read(stack)
    for name, parameter in stack.named_parameters():
        assert parameter.requires_grad
        if ".compression." in name or ".reconstruction." in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 1e-9, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("kind", LOSSES)
def test_the_language_model_goes_on_learning(kind: Any) -> None:
    """The system people copied froze its projections here for good, by a detach in place."""
    plain, with_loss = stack_of(None), stack_of(kind)
    with_loss.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    out, _, _ = plain.step(x, plain.init_state(2), None)
    out.square().sum().backward()
    again, _, _ = with_loss.step(x, with_loss.init_state(2), None)
    again.square().sum().backward()
    others = dict(with_loss.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert others[name].grad is not None
        torch.testing.assert_close(others[name].grad, parameter.grad, rtol=0, atol=1e-10)


def blocks_of(layer: Layer, x: Tensor, row: int, first: int, last: int) -> list[Tensor]:
    """The blocks of the document x[row, first:last] that cross the edge in it."""
    whole = max(0, last - first - WINDOW) // RATE
    return [x[row, first + b * RATE : first + (b + 1) * RATE] for b in range(whole)]


def one_call() -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[1, 7] = True
    return x, starts, [(0, 0, 12), (1, 0, 7), (1, 7, 12)]


def test_auto_encoding_is_the_mean_over_blocks() -> None:
    stack = stack_of(partial(AutoEncoding, weight=0.5))
    layer, (x, starts, documents) = stack.layers[0], one_call()
    _, _, losses = stack.step(x, stack.init_state(2), starts)
    memory = layer.memory
    errors = [
        (memory.reconstruction.decoder(memory.compression(block[None, None])).view(RATE, DIM) - block).square().mean()
        for document in documents
        for block in blocks_of(layer, x, *document)
    ]
    assert len(errors) == 5
    truth = 0.5 * torch.stack(errors).mean()
    torch.testing.assert_close(losses[0]["auto_encoding"], truth, rtol=0, atol=1e-12)


def test_attention_reconstruction_is_the_papers() -> None:
    """Algorithm 2: attend by content to the old states and to their entries, mean squared difference."""
    stack = stack_of(AttentionReconstruction)
    layer, (x, starts, documents) = stack.layers[0], one_call()
    _, _, losses = stack.step(x, stack.init_state(2), starts)

    def attend(row: int, entries: Tensor) -> Tensor:
        q, k, v = (
            layer.project(y, part, frozen=True) for y, part in ((x[row], "query"), (entries, "key"), (entries, "value"))
        )
        heads = [torch.softmax(q[:, h] @ k[:, h].T * (DIM // HEADS) ** -0.5, -1) @ v[:, h] for h in range(HEADS)]
        return torch.stack(heads, 1)

    errors = []
    for row in range(2):
        blocks = [block for r, *bounds in documents if r == row for block in blocks_of(layer, x, row, *bounds)]
        entries = torch.cat([layer.memory.compression(block[None, None])[0] for block in blocks])
        errors.append((attend(row, torch.cat(blocks)) - attend(row, entries)).square().mean())
    truth = torch.stack(errors).mean()
    torch.testing.assert_close(losses[0]["attention_reconstruction"], truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_zero_and_finite_where_no_block_left(kind: Any) -> None:
    """DDP needs a gradient of every weight, also from a segment that compresses nothing."""
    stack = stack_of(kind)
    _, _, losses = stack.step(torch.randn(2, 3, DIM, dtype=torch.float64), stack.init_state(2), None)
    loss = torch.stack([value for one in losses for value in one.values()]).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    for layer in stack.layers:
        for parameter in [*layer.memory.compression.parameters(), *layer.memory.reconstruction.parameters()]:
            assert parameter.grad is not None
            assert not parameter.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_reading_makes_no_loss(kind: Any) -> None:
    stack = stack_of(kind).eval()
    _, _, losses = stack.step(torch.randn(1, 12, DIM, dtype=torch.float64), stack.init_state(1), None)
    assert losses == [{}, {}]


def test_works_with_a_compression_that_ranks_by_usage() -> None:
    stack = stack_of(AutoEncoding, MostUsed)
    _, loss = read(stack)
    assert float(loss.detach()) > 0
