"""Big Bird's attention against loops in float64: windows, global ends, random blocks, padding, short texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtx.errors import MemtxError
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.encoder_inputs import EncoderInputs


def plain(layer: BigBirdAttention, x: Tensor, present: Tensor, table: Tensor | None) -> Tensor:
    """One query at a time, as the article says; table: (heads, blocks - 2, r), None where everyone sees everyone."""
    rows, length, dim = x.shape
    width, size = dim // layer.heads, layer.block_size
    blocks = -(-length // size)
    out = torch.zeros(rows, length, dim, dtype=x.dtype)
    for row in range(rows):
        for t in range(length):
            if table is not None and not present[row, t]:
                continue
            for head in range(layer.heads):
                own = t // size
                if table is None or own in (0, blocks - 1):
                    seen = list(range(blocks))
                else:
                    seen = sorted({0, blocks - 1, own - 1, own, own + 1}) + table[head, own - 1].tolist()
                keys = [j for b in seen for j in range(b * size, min(b * size + size, length)) if present[row, j]]
                at = slice(head * width, (head + 1) * width)
                k, v = layer.key(x[row, keys])[:, at], layer.value(x[row, keys])[:, at]
                score = k @ layer.query(x[row, t])[at] / width**0.5
                out[row, t, at] = torch.softmax(score, 0) @ v
    return layer.out(out)


@given(data=st.data())
def test_every_query_sees_what_the_article_says(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, size, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    length = data.draw(st.integers(size, (8 + 2 * count) * size))
    layer = BigBirdAttention(4, 2, 1, size, count).double()
    x = torch.randn(rows, length, 4, dtype=torch.float64, requires_grad=True)
    present = torch.rand(rows, length) < data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    present[:, data.draw(st.integers(0, length - 1))] = True  # a text of padding alone has nothing to see
    table = None
    blocks = {}
    if length > (5 + 2 * count) * size:
        table = layer._random_block_table(EncoderInputs(-(-length // size) * size, torch.device("cpu")), None)
        table = torch.where(table == 0, 0, torch.where(table == 1, -(-length // size) - 1, table - 1))
        if data.draw(st.booleans()):  # given by hand: any block, several times or seen already
            many = data.draw(st.integers(1, 3))
            table = torch.randint(0, -(-length // size), (2, -(-length // size) - 2, many))
            blocks = {1: table}
    reading = EncoderInputs.from_masks(torch.zeros(rows, length), present.long(), random_blocks=blocks)
    own, wanted = layer(x, reading), plain(layer, x, present, table)
    assert torch.allclose(own, wanted, rtol=0, atol=1e-12)  # float64, a few dozen terms
    parameters = [x, *layer.parameters()]
    upstream = torch.randn_like(own)
    grads = torch.autograd.grad((own * upstream).sum(), parameters)
    truth = torch.autograd.grad((wanted * upstream).sum(), parameters)
    for one, other in zip(grads, truth, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (torch.zeros(2, 5, 1, dtype=torch.int64), r"\(2, 5, 1\), expected \(2, 8, any\)"),
        (torch.zeros(3, 8, 1, dtype=torch.int64), r"\(3, 8, 1\)"),
        (torch.full((2, 8, 1), 10), "do not exist.*Give integers from 0 to 9"),
        (torch.zeros(2, 8, 1), "do not exist"),
    ],
)
def test_a_table_that_does_not_fit_is_named(table: Tensor, said: str) -> None:
    layer = BigBirdAttention(4, 2, 0, block_size=2, num_random_blocks=1)
    x = torch.zeros(1, 20, 4)
    with pytest.raises(MemtxError, match=said):
        layer(x, EncoderInputs.from_masks(x[..., 0], random_blocks={0: table}))


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(MemtxError, match="block_size is 0"):
        BigBirdAttention(4, 2, block_size=0)
    with pytest.raises(MemtxError, match="num_random_blocks is -1"):
        BigBirdAttention(4, 2, num_random_blocks=-1)
