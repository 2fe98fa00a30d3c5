"""Relative positions in the memory transformer, against a plain transcription of the Compressive Transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memtx import (
    CompressedMemory,
    FeedForward,
    MemoryTransformer,
    RecurrentMemory,
    RelativePositions,
    RMTMemory,
    SinkMemory,
)
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.layers.attention import MemoryAttention
from memtx.memory.compression import AttentionReconstruction, MeanPooling, StridedConvolution
from memtx.models.memory_length import memory_length
from memtx.ops.attention.dispatch import AttentionBackend
from tests.memory_zoo import top_k

EXACT = 1e-10
"""float64: sums in another order."""


def build(
    segment: int, rate: int, num_entries: int, kv_heads: int | None = None, backend: AttentionBackend = "auto"
) -> MemoryTransformer:
    """Return the published architecture with small widths and weights large enough for every term to matter."""
    memory = partial(
        CompressedMemory, window=segment, compression_rate=rate, num_entries=num_entries, compress_per_segment=True,
        language_gradient=False, reconstruction=AttentionReconstruction,
    )  # fmt: skip
    model = MemoryTransformer(
        7, dim=8, depth=2, heads=2, kv_heads=kv_heads, memories=[memory], norm=nn.LayerNorm, norm_placement="residual",
        feed_forward=partial(FeedForward, hidden_dim=12, activation=nn.ReLU), positions=RelativePositions,
        attention_backend=backend,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def sinusoid(distance: int, width: int) -> Tensor:
    """Return the embedding of a distance, sines before cosines (Dai et al. 2019, section 3.3)."""
    angle = distance / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat([angle.sin(), angle.cos()])


def attend(attention: Any, h: Tensor, entries: Tensor) -> Tensor:
    """Return relative attention of a sequence h over [compressed memory | memory | h], scores a to d one by one."""
    heads, size, positions = attention.heads, attention.head_dim, attention.positions
    w_r = positions.distance.weight.view(heads, size, -1)
    q = attention.query(h).view(len(h), heads, size)
    k, v = attention.key_value(entries).view(len(entries), 2, heads, size).unbind(1)
    outputs = []
    for i in range(len(h)):
        current, out = len(entries) - len(h) + i, []
        for head in range(heads):
            u, v_bias = positions.content_bias[head], positions.position_bias[head]
            scores = []
            for j in range(current + 1):
                r = w_r[head] @ sinusoid(current - j, positions.width)
                a, b = q[i, head] @ k[j, head], q[i, head] @ r
                c, d = u @ k[j, head], v_bias @ r
                scores.append((a + b + c + d) / size**0.5)
            out.append(torch.softmax(torch.stack(scores), 0) @ v[: current + 1, head])
        outputs.append(attention.out(torch.cat(out)))
    return torch.stack(outputs)


def plain(model: MemoryTransformer, tokens: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    """Return logits and compression loss of one document by Rae et al. 2020, algorithms 1 and 2; memories begin empty.

    As here, the loss is the mean square instead of the norm, and the mean of the layers and of the segments with a
    compression; the compressed memory receives no gradient of the language model.
    """
    empty = torch.zeros(0, model.dim, dtype=torch.float64)
    memories = [(empty, empty) for _ in model._layers()]
    logits, total = [], torch.zeros((), dtype=torch.float64)
    for start in range(0, len(tokens), segment):
        h = model.embedding(tokens[start : start + segment])
        losses = []
        for layer, block in enumerate(model._layers()):
            (cm, m), memory = memories[layer], block.attention.memory
            a = block.attention_residual_norm(attend(block.attention, h, torch.cat([cm, m, h])) + h)
            if len(m) == segment:
                old, frozen = m.detach(), h.detach()
                blocks = old.view(1, -1, memory.compression_rate, model.dim)
                new = memory.compression(blocks)[0]
                losses.append((content(block.attention, frozen, old) - content(block.attention, frozen, new)).square())
                cm = torch.cat([cm, new.detach()])[max(0, len(cm) + len(new) - memory.num_entries) :]
            memories[layer] = (cm, h.detach())
            h = block.feed_forward_residual_norm(block.feed_forward(a) + a)
        logits.append(F.linear(h, model.head.weight))  # type: ignore[union-attr]
        if losses:
            total = total + torch.stack([loss.mean() for loss in losses]).mean()
    return torch.cat(logits), total


def content(attention: MemoryAttention, h: Tensor, m: Tensor) -> Tensor:
    """Return attention by content alone, with frozen weights."""
    heads, size = attention.heads, attention.head_dim
    q = F.linear(h, attention.query.weight.detach()).view(-1, heads, size)
    k, v = F.linear(m, attention.key_value.weight.detach()).view(-1, 2, heads, size).unbind(1)
    return torch.einsum("hqk,khd->qhd", torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / size**0.5, -1), v)


@pytest.mark.parametrize(("segment", "rate", "num_entries"), [(4, 2, 3), (6, 3, 4), (3, 1, 5)])
def test_the_compressive_transformer_equals_its_equations(segment: int, rate: int, num_entries: int) -> None:
    torch.manual_seed(rate)
    model = build(segment, rate, num_entries)
    tokens = torch.randint(0, 7, (5 * segment + 1,))
    logits, compression_loss = plain(model, tokens[:-1], segment)
    expected_loss = F.cross_entropy(logits, tokens[1:]) + compression_loss
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(expected_loss, list(parameters.values()), allow_unused=True)
    state, nll, auxiliary = None, [], []
    for start in range(0, 5 * segment, segment):
        part = slice(start, start + segment)
        out = model(tokens[None, :-1][:, part], state, labels=tokens[None, 1:][:, part])
        state = out.state.detach()
        nll.append(out.language_loss)
        auxiliary.append(sum(out.aux_losses.values()))
    loss = torch.stack(nll).mean() + torch.stack(auxiliary).sum()
    assert abs(loss - expected_loss) < EXACT
    for (name, parameter), grad in zip(parameters.items(), expected, strict=True):
        assert grad is not None, name
        (actual,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert (actual - grad).abs().max() < 1e-9, name


@given(data=st.data())
def test_any_segmentation_counts_the_same_distances(data: st.DataObject) -> None:
    """Entry b of n evicted blocks is n - b positions before the oldest exact state that the query sees."""
    window, rate, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    memory = partial(CompressedMemory, window=window, compression_rate=rate, num_entries=length, entry_bias=0.5)
    model = MemoryTransformer(7, dim=8, depth=1, heads=2, memories=[memory], positions=RelativePositions).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens, block = torch.randint(0, 7, (data.draw(st.integers(1, 30)),)), model._layers()[0]
    attention: Any = block.attention
    h, positions = block.attention_norm(model.embedding(tokens)), attention.positions
    w_r = positions.distance.weight.view(2, 4, -1)
    outputs = []
    for t in range(len(tokens)):
        evicted = max(0, (t - window + 1) // rate)
        blocks = range(max(0, evicted - length), evicted)
        entries = [attention.memory.compression(h[None, None, b * rate : (b + 1) * rate])[0, 0] for b in blocks]
        e = torch.stack([*entries, *h[evicted * rate : t + 1]])
        q = attention.query(h[t]).view(2, 4)
        k, v = attention.key_value(e).view(len(e), 2, 2, 4).unbind(1)
        out = []
        for head in range(2):
            r = torch.stack([w_r[head] @ sinusoid(len(e) - 1 - j, 8) for j in range(len(e))])
            scores = k[:, head] @ (q[head] + positions.content_bias[head])
            scores = (scores + r @ (q[head] + positions.position_bias[head])) / 2
            scores = scores + attention.entry_bias[head] * (torch.arange(len(e)) < len(entries))
            out.append(torch.softmax(scores, 0) @ v[:, head])
        outputs.append(attention.out(torch.cat(out)))
    actual = attention(h[None], (attention.memory.init_state(1, like=h),), _segment(len(tokens)))[0]
    assert (actual[0] - torch.stack(outputs)).abs().max() < EXACT


def _segment(length: int) -> Any:
    from memtx.segment import Segment

    return Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), length)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_banded_equals_the_reference(kv_heads: int) -> None:
    torch.manual_seed(0)
    tokens, results = torch.randint(0, 7, (2, 300)), []
    for backend in ("reference", "banded", "auto"):
        torch.manual_seed(1)
        model = build(150, 3, 20, kv_heads, backend)  # type: ignore[arg-type]
        first = model(tokens, labels=tokens)
        loss = first.loss + model(tokens, first.state, labels=tokens).loss
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    for loss, grads in results[1:]:
        assert abs(loss - results[0][0]) < EXACT
        for grad, expected in zip(grads, results[0][1], strict=True):
            assert (grad - expected).abs().max() < EXACT


@pytest.mark.parametrize("backend", ["cpp", "flex", "triton"])
def test_fused_backends_refuse_relative_positions(backend: AttentionBackend) -> None:
    model = build(4, 2, 3, backend=backend).float()
    with pytest.raises(MemtxError, match=f"The backend '{backend}' does not support relative positions"):
        model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    "memories",
    [
        [top_k()(4, 2, 3)],
        [partial(RecurrentMemory, window=4, dilation=2)],
        [[partial(RecurrentMemory, window=4), partial(SinkMemory, exclude_recent=4, use_positions=True)]],
        [partial(RMTMemory, num_tokens=2, interval=4)],
    ],
)
def test_entries_without_a_count_are_refused(memories: Any) -> None:
    with pytest.raises(MemtxError, match="RelativePositions cannot count the entries of"):
        MemoryTransformer(7, dim=8, depth=1, heads=2, memories=memories, positions=RelativePositions)


def test_a_clamp_makes_far_distances_equal() -> None:
    torch.manual_seed(0)
    memory = partial(RecurrentMemory, window=9)
    model = MemoryTransformer(
        7, dim=8, depth=1, heads=2, memories=[memory], positions=partial(RelativePositions, clamp_length=0, width=6)
    ).double()  # fmt: skip
    tokens = torch.randint(0, 7, (1, 9))
    with memory_length(model, None, clamp_length=3, same_length=None):
        clamped = model(tokens).logits
        decoder = Decoder(model.eval(), model.init_state(1))
        steps = torch.stack([decoder.step(tokens[:, index]) for index in range(9)], dim=1)
    assert (clamped - steps).abs().max() < EXACT
    free = model(tokens).logits
    assert torch.equal(free[:, :4], clamped[:, :4])
    assert not torch.allclose(free[:, 4:], clamped[:, 4:])


@pytest.mark.parametrize("joint", [False, True])
def test_the_language_model_trains_the_compression_only_if_it_is_joined(joint: bool) -> None:
    """Read in one call, entries are seen by the segment that evicts their blocks."""
    torch.manual_seed(0)
    memory = partial(
        CompressedMemory, window=4, compression_rate=2, num_entries=3, language_gradient=joint,
        reconstruction=AttentionReconstruction,
    )  # fmt: skip
    model = MemoryTransformer(7, dim=8, depth=2, heads=2, memories=[memory])
    out = model(torch.randint(0, 7, (1, 24)), labels=torch.randint(0, 7, (1, 24)))
    weight = model._layers()[1].attention.memory.compression.proj.weight  # type: ignore[union-attr]
    (grad,) = torch.autograd.grad(out.language_loss, weight, retain_graph=True, allow_unused=True)
    assert (grad is not None and bool(grad.any())) is joint
    (grad,) = torch.autograd.grad(sum(out.aux_losses.values()), weight)
    assert grad.any()


def test_a_compression_that_nothing_trains_is_refused() -> None:
    with pytest.raises(MemtxError, match="language_gradient is False, but StridedConvolution has no other loss"):
        CompressedMemory(8, compression=StridedConvolution, language_gradient=False)
    CompressedMemory(8, compression=MeanPooling, language_gradient=False)
