"""Causal dilated windows equal dense attention by their definition: one query and one key at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memory.recurrent import RecurrentMemory
from memtx.ops.attention.bias import AlibiBias, RelativeBias
from memtx.ops.attention.dispatch import AttentionBackend, segment_attention
from memtx.ops.attention.mask import Visibility
from memtx.ops.cpu.attention import is_available
from memtx.segment import Segment

HEADS = 4
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def visibility_of(memory: RecurrentMemory, segment: Segment) -> Visibility:
    """Return the visibility of [cache | segment] as attention gets it."""
    batch_size, x = segment.position.shape[0], torch.zeros(*segment.position.shape, memory.dim)
    view = memory.read(memory.init_state(batch_size, like=x), x, segment, None)  # type: ignore[arg-type]
    return view.entry_positions.visibility


def dense(
    q: Tensor, k: Tensor, v: Tensor, distances: list[int], window: int, document: Tensor, slopes: Tensor
) -> Tensor:
    """Return attention by the definition; ``document`` ``(batch, keys)`` is -1 for entries that do not exist."""
    num_past, group = k.shape[2] - q.shape[2], HEADS // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    age = torch.arange(num_past, k.shape[2])[:, None] - torch.arange(k.shape[2])
    distance = torch.tensor(distances)[:, None, None]
    seen = (age >= 0) & (age < window * distance) & (age % distance == 0)
    mask = seen & (document[:, None, num_past:, None] == document[:, None, None, :])
    scores = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 - slopes[:, None, None].double() * age
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("backend", ["reference", "banded", "cpp"])
@given(data=st.data())
def test_every_backend_equals_the_dense_reference(backend: AttentionBackend, data: st.DataObject) -> None:
    check(backend, data)


@settings(max_examples=3)  # flex_attention is slow without a compiler
@given(data=st.data())
def test_flex_equals_the_dense_reference(data: st.DataObject) -> None:
    check("flex", data)


def check(backend: AttentionBackend, data: st.DataObject) -> None:
    """Draw windows, documents and a cut, and compare."""
    if backend == "cpp" and not is_available():
        pytest.skip("no C++ compiler")
    draw = data.draw
    window, length, past = draw(st.integers(1, 6)), draw(st.integers(1, 30)), draw(st.integers(0, 40))
    dilation = draw(st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), max_size=HEADS)))
    kv_heads, batch_size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    document_starts = torch.rand(batch_size, length, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    segment = Segment.from_document_starts(torch.full((batch_size,), past), length, document_starts)
    memory = RecurrentMemory(8, window, dilation=dilation)
    visibility = visibility_of(memory, segment)
    num_past = visibility.num_keys - length
    dtype = torch.float32 if backend == "cpp" else torch.float64
    q = torch.randn(batch_size, HEADS, length, 8, generator=generator, dtype=dtype)
    k, v = (torch.randn(batch_size, kv_heads, num_past + length, 8, generator=generator, dtype=dtype) for _ in "kv")
    slopes = SLOPES * draw(st.booleans())
    bias = AlibiBias(slopes, torch.arange(-num_past, length)[None].double()) if slopes.any() else None
    document = torch.cat([torch.where(torch.arange(-num_past, 0) >= -past, 0, -1).expand(batch_size, -1),
                          segment.document_id], dim=1)  # fmt: skip
    distances = [dilation] * HEADS if isinstance(dilation, int) else [1] * (HEADS - len(dilation)) + dilation
    with torch.no_grad():
        out, lse = segment_attention(q, k, v, visibility, bias=bias, backend=backend, return_lse=True)
        again, _ = segment_attention(q, k, v, visibility, bias=bias, backend=backend)
    expected = dense(q, k, v, distances, window, document, slopes)
    assert (out - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(out, again)
    assert lse is not None
    assert lse.shape == out.shape[:3]


def test_gradients_equal_the_reference() -> None:
    memory = RecurrentMemory(8, 4, dilation=[2, 3])
    visibility = visibility_of(memory, Segment.from_document_starts(torch.tensor([5]), 17))
    shapes = [(1, HEADS, 17, 8), (1, 2, visibility.num_keys, 8), (1, 2, visibility.num_keys, 8)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    gradients = []
    for backend in ("reference", "banded"):
        out, lse = segment_attention(*tensors, visibility, backend=backend, return_lse=True)  # type: ignore[arg-type]
        assert lse is not None
        gradients.append(torch.autograd.grad((out * out.detach()).sum() + lse.sum(), tensors))
    torch.testing.assert_close(*gradients)


def test_misfits_are_refused_in_one_line() -> None:
    for options in ({"dilation": 0}, {"dilation": [2, 0]}, {"dilation": 2, "same_length": False}):
        with pytest.raises(MemtxError, match="dilation"):
            RecurrentMemory(8, 4, **options)  # type: ignore[arg-type]
    with pytest.raises(MemtxError, match="near_window"):
        RecurrentMemory(8, 4, dilation=2, near_window=2)
    visibility = visibility_of(RecurrentMemory(8, 4, dilation=2), Segment.from_document_starts(torch.tensor([0]), 3))
    q = torch.zeros(1, HEADS, 3, 8)
    with pytest.raises(MemtxError, match="learned by distance"):
        segment_attention(q, q, q, visibility, bias=RelativeBias(torch.zeros(HEADS, 4), torch.arange(3)[None]))
