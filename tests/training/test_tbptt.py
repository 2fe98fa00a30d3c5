"""Truncated back-propagation: full gradients within a batch, none beyond, and no graph kept after it."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx.data.batch import IGNORE_INDEX
from memtx.memory.compression import AttentionReconstruction
from memtx.state import MemoryState
from memtx.training.tbptt import UnrollOutput, unroll
from tests.training.small import data, memory, model, module, trainer

# float64: what is left is rounding, of sums in another order.
EXACT: Any = {"atol": 1e-12, "rtol": 1e-9}


def texts(seed: int, batch_size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and document starts, with starts and ignored labels at random positions."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 30, (batch_size, length + 1), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < 0.1] = IGNORE_INDEX
    return tokens[:, :-1], labels, torch.rand(labels.shape, generator=draw) < 0.1


def gradients(network: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = network.named_parameters()
    return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in parameters}


@given(
    segment=st.integers(1, 7),
    bptt_segments=st.integers(1, 4),
    short=st.integers(0, 6),
    before=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_gradients_equal_plain_backpropagation(
    segment: int, bptt_segments: int, short: int, before: int, seed: int
) -> None:
    torch.manual_seed(seed)
    decoder = model(30).double()
    length = max(1, segment * bptt_segments - short)
    tokens, labels, document_starts = texts(seed, 2, before + length)
    state = decoder.init_state(2)
    if before:
        first = slice(0, before)
        # Its graph must not reach the next batch.
        state = unroll(
            decoder, tokens[:, first], labels[:, first], document_starts[:, first], state, segment_length=segment
        ).state
    part = slice(before, before + length)
    output = unroll(decoder, tokens[:, part], labels[:, part], document_starts[:, part], state, segment_length=segment)
    # All of it in one call and in torch's own terms, from the same state as a constant.
    constant = state.with_named_tensors(
        {name: tensor.detach().clone() for name, tensor in state.named_tensors().items()}
    )
    logits = decoder(tokens[:, part], constant, document_starts=document_starts[:, part]).logits
    plain = F.cross_entropy(logits.flatten(0, 1), labels[:, part].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    scored = (labels[:, part] != IGNORE_INDEX).sum()
    plain = plain / scored.clamp(min=1)
    assert output.num_scored == scored
    torch.testing.assert_close(output.loss, plain, **EXACT)
    torch.testing.assert_close(output.nll.sum() / scored.clamp(min=1), plain.detach(), **EXACT)
    expected = gradients(decoder, plain)
    for name, gradient in gradients(decoder, output.loss).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_more_bptt_segments_change_the_gradients() -> None:
    """The memory between the segments is learned through: truncation changes the gradients."""
    decoder = model(30).double()
    tokens, labels, _ = texts(0, 2, 24)
    document_starts = torch.zeros_like(tokens, dtype=torch.bool)
    full = gradients(
        decoder, unroll(decoder, tokens, labels, document_starts, decoder.init_state(2), segment_length=8).loss
    )
    state, losses = decoder.init_state(2), []
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        output = unroll(decoder, tokens[:, part], labels[:, part], document_starts[:, part], state, segment_length=8)
        state = output.state
        losses.append(output.loss * (output.num_scored / (labels != IGNORE_INDEX).sum()))
    truncated = gradients(decoder, torch.stack(losses).sum())
    # They differ by far more than rounding in float64.
    assert any(not torch.allclose(truncated[name], gradient, atol=1e-6, rtol=1e-3) for name, gradient in full.items())


def test_auxiliary_losses_are_averaged_over_segments() -> None:
    torch.manual_seed(0)
    decoder = model(30, memories=(memory(reconstruction=AttentionReconstruction),)).double().train()
    tokens, labels, document_starts = texts(0, 2, 24)
    output = unroll(decoder, tokens, labels, document_starts, decoder.init_state(2), segment_length=8)
    state, aux_losses = decoder.init_state(2), list[Tensor]()
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        segment_output = decoder(
            tokens[:, part], state, document_starts=document_starts[:, part], labels=labels[:, part]
        )
        state = segment_output.state
        aux_losses.append(sum(segment_output.aux_losses.values()))
    scored = (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(output.loss, output.nll.sum() / scored + torch.stack(aux_losses).mean(), **EXACT)
    assert output.losses
    assert not any(value.requires_grad for value in output.losses.values())


def free(state: MemoryState) -> bool:
    return all(tensor.grad_fn is None and not tensor.requires_grad for tensor in state.named_tensors().values())


def test_the_state_has_no_graph() -> None:
    decoder = model(30)
    out: UnrollOutput = unroll(decoder, *texts(0, 2, 16), decoder.init_state(2), segment_length=8)
    assert out.loss.requires_grad
    assert free(out.state)
    assert not out.nll.requires_grad


class Graph(pl.Callback):
    """Counts tensors with a graph between the batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        gc.collect()
        self.counts.append(sum(type(x) is Tensor and x.grad_fn is not None for x in gc.get_objects()))
        carry: Any = pl_module.carry
        assert all(free(state) for state in carry._states.values())


def test_no_graph_is_kept_between_batches(tmp_path: Path) -> None:
    graph = Graph()
    trainer(tmp_path, graph, max_steps=6, limit_val_batches=0).fit(module(), datamodule=data(tmp_path))
    assert len(graph.counts) == 6
    assert max(graph.counts[1:]) == min(graph.counts[1:])


@pytest.mark.parametrize("rate", [1, 3])
def test_short_segments_are_weighted_by_their_labels(rate: int) -> None:
    """A segment of one label does not weigh as much as a full one."""
    torch.manual_seed(0)
    decoder = model(30, memories=(partial(memory(), compression_rate=rate),)).double()
    tokens, labels, document_starts = texts(1, 1, 17)
    out = unroll(decoder, tokens, labels, document_starts, decoder.init_state(1), segment_length=8)
    torch.testing.assert_close(out.loss, out.nll.sum() / (labels != IGNORE_INDEX).sum(), **EXACT)
