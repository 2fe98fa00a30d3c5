"""Reconstruction losses train only the compression and its decoder, and freeze nothing."""

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


def build_stack(reconstruction: Any, compression: Any = StridedConvolution) -> Stack:
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
    """Return the output and the sum of the auxiliary losses for inputs that require gradients."""
    x = torch.randn(2, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    document_starts = torch.zeros(2, n, dtype=torch.bool)
    document_starts[1, 7] = True  # stream 1 evicts fewer blocks than stream 0
    out, _, losses = stack.step(x, stack.init_state(2), document_starts)
    assert all(len(segment_losses) == 1 for segment_losses in losses)
    auxiliary = torch.stack([value for segment_losses in losses for value in segment_losses.values()]).sum()
    auxiliary.backward(retain_graph=True)
    assert x.grad is None or not x.grad.any(), "the loss reached the inputs"
    return out, auxiliary


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_compression_learns_from_the_loss(kind: Any) -> None:
    stack = build_stack(kind)
    read(stack)
    for name, parameter in stack.named_parameters():
        assert parameter.requires_grad
        if ".compression." in name or ".reconstruction." in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 1e-9, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("kind", LOSSES)
def test_the_language_model_keeps_learning(kind: Any) -> None:
    """A detach in place, as in a widely copied implementation, would freeze the projections for good."""
    plain, with_loss = build_stack(None), build_stack(kind)
    with_loss.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    out, _, _ = plain.step(x, plain.init_state(2), None)
    out.square().sum().backward()
    with_loss_out, _, _ = with_loss.step(x, with_loss.init_state(2), None)
    with_loss_out.square().sum().backward()
    others = dict(with_loss.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert others[name].grad is not None
        torch.testing.assert_close(others[name].grad, parameter.grad, rtol=0, atol=1e-10)


def evicted_blocks(layer: Layer, x: Tensor, stream: int, first: int, last: int) -> list[Tensor]:
    """Return the blocks of the document ``x[stream, first:last]`` that are evicted within it."""
    num_blocks = max(0, last - first - WINDOW) // RATE
    return [x[stream, first + b * RATE : first + (b + 1) * RATE] for b in range(num_blocks)]


def sample_call() -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    document_starts = torch.zeros(2, 12, dtype=torch.bool)
    document_starts[1, 7] = True
    return x, document_starts, [(0, 0, 12), (1, 0, 7), (1, 7, 12)]


def test_auto_encoding_is_the_mean_error_over_blocks() -> None:
    stack = build_stack(partial(AutoEncoding, weight=0.5))
    layer, (x, document_starts, documents) = stack.layers[0], sample_call()
    _, _, losses = stack.step(x, stack.init_state(2), document_starts)
    memory = layer.memory
    errors = [
        (memory.reconstruction.decoder(memory.compression(block[None, None])).view(RATE, DIM) - block).square().mean()
        for document in documents
        for block in evicted_blocks(layer, x, *document)
    ]
    assert len(errors) == 5
    expected = 0.5 * torch.stack(errors).mean()
    torch.testing.assert_close(losses[0]["auto_encoding"], expected, rtol=0, atol=1e-12)


def test_attention_reconstruction_matches_the_paper() -> None:
    """Algorithm 2 is the mean squared difference between attention by content to the states and to their entries."""
    stack = build_stack(AttentionReconstruction)
    layer, (x, document_starts, documents) = stack.layers[0], sample_call()
    _, _, losses = stack.step(x, stack.init_state(2), document_starts)

    def attend(stream: int, entries: Tensor) -> Tensor:
        q, k, v = (
            layer.project(y, part, frozen=True)
            for y, part in ((x[stream], "query"), (entries, "key"), (entries, "value"))
        )
        heads = [torch.softmax(q[:, h] @ k[:, h].T * (DIM // HEADS) ** -0.5, -1) @ v[:, h] for h in range(HEADS)]
        return torch.stack(heads, 1)

    errors = []
    for stream in range(2):
        blocks = [
            block
            for document_stream, *bounds in documents
            if document_stream == stream
            for block in evicted_blocks(layer, x, stream, *bounds)
        ]
        entries = torch.cat([layer.memory.compression(block[None, None])[0] for block in blocks])
        errors.append((attend(stream, torch.cat(blocks)) - attend(stream, entries)).square().mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(losses[0]["attention_reconstruction"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_zero_without_evicted_blocks(kind: Any) -> None:
    """DDP needs a gradient for every weight, even from a segment that compresses nothing."""
    stack = build_stack(kind)
    _, _, losses = stack.step(torch.randn(2, 3, DIM, dtype=torch.float64), stack.init_state(2), None)
    loss = torch.stack([value for segment_losses in losses for value in segment_losses.values()]).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    for layer in stack.layers:
        for parameter in [*layer.memory.compression.parameters(), *layer.memory.reconstruction.parameters()]:
            assert parameter.grad is not None
            assert not parameter.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_eval_mode_has_no_losses(kind: Any) -> None:
    stack = build_stack(kind).eval()
    _, _, losses = stack.step(torch.randn(1, 12, DIM, dtype=torch.float64), stack.init_state(1), None)
    assert losses == [{}, {}]


def test_supports_a_compression_that_needs_usage() -> None:
    stack = build_stack(AutoEncoding, MostUsed)
    _, loss = read(stack)
    assert float(loss.detach()) > 0
