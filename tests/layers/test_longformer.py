"""Longformer's attention against loops in float64: windows, dilation, global and random tokens, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.encoder_attention import EncoderInputs
from memtx.layers.longformer import LongformerAttention


def attend_naively(
    layer: LongformerAttention, x: Tensor, present: Tensor, global_mask: Tensor, random_tokens: Tensor | None
) -> Tensor:
    """Attend one query at a time; random_tokens: ``(heads, length, num_random)``."""
    batch_size, length, dim = x.shape
    width = dim // layer.heads
    half, step = layer.window // 2, layer.dilation
    out = torch.zeros(batch_size, length, dim, dtype=x.dtype)
    for stream in range(batch_size):
        for t in range(length):
            if not present[stream, t]:
                continue
            is_global = bool(global_mask[stream, t])
            projections = (
                (layer.global_query, layer.global_key, layer.global_value)
                if is_global
                else (layer.query, layer.key, layer.value)
            )
            for head in range(layer.heads):
                seen = {t + step * i for i in range(-half, half + 1)} | {
                    j for j in range(length) if global_mask[stream, j]
                }
                if random_tokens is not None:
                    seen |= {int(j) for j in random_tokens[head, t]}
                if is_global:
                    seen = set(range(length))
                keys = [j for j in sorted(seen) if 0 <= j < length and present[stream, j]]
                channels = slice(head * width, (head + 1) * width)
                q, k, v = (
                    projections[0](x[stream, t])[channels],
                    projections[1](x[stream, keys])[:, channels],
                    projections[2](x[stream, keys])[:, channels],
                )
                out[stream, t, channels] = torch.softmax(k @ q / width**0.5, 0) @ v
    return layer.out(out)


@given(data=st.data())
def test_every_query_sees_the_published_pattern(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch_size, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 17))
    window, dilation = 2 * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    num_random = data.draw(st.integers(0, 2)) if dilation == 1 else 0
    layer = LongformerAttention(8, 2, 1, window, dilation, num_random, seed=3).double()
    x = torch.randn(batch_size, length, 8, dtype=torch.float64, requires_grad=True)
    present = torch.rand(batch_size, length) < data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    global_mask = (torch.rand(batch_size, length) < data.draw(st.sampled_from([0.0, 0.2, 0.6]))) & present
    inputs = EncoderInputs.from_masks(torch.zeros(batch_size, length), present.long(), global_mask.long())
    random_tokens = None
    if num_random:
        # Global keys are visible anyway, so this table is complete.
        pattern = layer._random_pattern(inputs, present, 0)
        assert pattern is not None
        random_tokens = pattern.random_blocks
        assert random_tokens.shape == (2, length, num_random)
        assert 0 <= random_tokens.min() <= random_tokens.max() < length
    actual, expected = layer(x, inputs), attend_naively(layer, x, present, global_mask, random_tokens)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)  # float64, a few dozen terms
    parameters = [x, *layer.parameters()]
    upstream = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * upstream).sum(), parameters, allow_unused=True)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), parameters, allow_unused=True)
    for pair in zip(grads, expected_grads, strict=True):
        grad, expected_grad = (torch.zeros(1) if part is None else part for part in pair)
        assert torch.allclose(grad, expected_grad.to(grad.dtype), rtol=0, atol=1e-11)


def test_dilation_without_masks_reads_every_text_of_a_batch() -> None:
    layer = LongformerAttention(8, 2, 1, window=2, dilation=3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    all_tokens = torch.ones(2, 7, dtype=torch.bool)
    out = layer(x, EncoderInputs(7, torch.device("cpu")))
    assert torch.allclose(
        out, attend_naively(layer, x, all_tokens, ~all_tokens, None), rtol=0, atol=1e-12
    )  # float64, few terms


def test_random_tokens_depend_on_layer_and_seed_only() -> None:
    def table(layer: int, seed: int) -> Tensor:
        inputs = EncoderInputs(12, torch.device("cpu"))
        pattern = LongformerAttention(8, 2, layer, 2, num_random_tokens=3, seed=seed)._random_pattern(
            inputs, torch.ones(1, 12).bool(), 0
        )
        assert pattern is not None
        assert pattern.random_blocks is not None
        return pattern.random_blocks

    assert torch.equal(table(0, 5), table(0, 5))
    assert not torch.equal(table(0, 5), table(1, 5))
    assert not torch.equal(table(0, 5), table(0, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window is 3"),
        ({"window": 0}, "window is 0"),
        ({"dilation": 0}, "dilation is 0"),
        ({"num_random_tokens": 2, "dilation": 2}, r"num_random_tokens \(2\) cannot be combined with dilation \(2\)"),
    ],
)
def test_rejects_invalid_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        LongformerAttention(8, 2, **options)
