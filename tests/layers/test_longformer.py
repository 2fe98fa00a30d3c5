"""Longformer's attention against loops in float64: windows, dilation, global tokens, random links, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.encoder_inputs import EncoderInputs
from memtx.layers.longformer import LongformerAttention


def plain(layer: LongformerAttention, x: Tensor, present: Tensor, marked: Tensor, links: Tensor | None) -> Tensor:
    """One query at a time, as the article says; links: (heads, length, links)."""
    rows, length, dim = x.shape
    width = dim // layer.heads
    half, step = layer.window // 2, layer.dilation
    out = torch.zeros(rows, length, dim, dtype=x.dtype)
    for row in range(rows):
        for t in range(length):
            if not present[row, t]:
                continue
            asking = bool(marked[row, t])
            maps = (
                (layer.global_query, layer.global_key, layer.global_value)
                if asking
                else (layer.query, layer.key, layer.value)
            )
            for head in range(layer.heads):
                seen = {t + step * i for i in range(-half, half + 1)} | {j for j in range(length) if marked[row, j]}
                if links is not None:
                    seen |= {int(j) for j in links[head, t]}
                if asking:
                    seen = set(range(length))
                keys = [j for j in sorted(seen) if 0 <= j < length and present[row, j]]
                at = slice(head * width, (head + 1) * width)
                q, k, v = maps[0](x[row, t])[at], maps[1](x[row, keys])[:, at], maps[2](x[row, keys])[:, at]
                out[row, t, at] = torch.softmax(k @ q / width**0.5, 0) @ v
    return layer.out(out)


@given(data=st.data())
def test_every_query_sees_what_the_article_says(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 17))
    window, dilation = 2 * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    links = data.draw(st.integers(0, 2)) if dilation == 1 else 0
    layer = LongformerAttention(8, 2, 1, window, dilation, links, seed=3).double()
    x = torch.randn(rows, length, 8, dtype=torch.float64, requires_grad=True)
    present = torch.rand(rows, length) < data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    marked = (torch.rand(rows, length) < data.draw(st.sampled_from([0.0, 0.2, 0.6]))) & present
    reading = EncoderInputs.from_masks(torch.zeros(rows, length), present.long(), marked.long())
    drawn = None
    if links:
        # Marked keys are seen anyway, so the drawn table says all.
        pattern = layer._random_pattern(reading, present, 0)
        assert pattern is not None
        drawn = pattern.random_blocks
        assert drawn.shape == (2, length, links)
        assert 0 <= drawn.min() <= drawn.max() < length
    own, wanted = layer(x, reading), plain(layer, x, present, marked, drawn)
    assert torch.allclose(own, wanted, rtol=0, atol=1e-12)  # float64, a few dozen terms
    parameters = [x, *layer.parameters()]
    upstream = torch.randn_like(own)
    grads = torch.autograd.grad((own * upstream).sum(), parameters, allow_unused=True)
    truth = torch.autograd.grad((wanted * upstream).sum(), parameters, allow_unused=True)
    for one, other in zip(grads, truth, strict=True):
        one, other = (torch.zeros(1) if g is None else g for g in (one, other))
        assert torch.allclose(one, other.to(one.dtype), rtol=0, atol=1e-11)


def test_dilation_without_masks_reads_every_text_of_a_batch() -> None:
    layer = LongformerAttention(8, 2, 1, window=2, dilation=3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    everything = torch.ones(2, 7, dtype=torch.bool)
    out = layer(x, EncoderInputs(7, torch.device("cpu")))
    assert torch.allclose(out, plain(layer, x, everything, ~everything, None), rtol=0, atol=1e-12)  # float64, few terms


def test_links_differ_by_layer_and_stay_by_seed() -> None:
    def table(layer: int, seed: int) -> Tensor:
        reading = EncoderInputs(12, torch.device("cpu"))
        pattern = LongformerAttention(8, 2, layer, 2, num_random_tokens=3, seed=seed)._random_pattern(
            reading, torch.ones(1, 12).bool(), 0
        )
        assert pattern is not None
        assert pattern.random_blocks is not None
        return pattern.random_blocks

    assert torch.equal(table(0, 5), table(0, 5))
    assert not torch.equal(table(0, 5), table(1, 5))
    assert not torch.equal(table(0, 5), table(0, 6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 3}, "window is 3"),
        ({"window": 0}, "window is 0"),
        ({"dilation": 0}, "dilation is 0"),
        ({"num_random_tokens": 2, "dilation": 2}, r"num_random_tokens \(2\) cannot be combined with dilation \(2\)"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, int], said: str) -> None:
    with pytest.raises(MemtxError, match=said):
        LongformerAttention(8, 2, **options)
