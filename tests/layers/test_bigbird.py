"""BigBird's attention against loops in float64: windows, global blocks, random blocks, padding, short texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.errors import MemtxError
from memtx.layers.bigbird import BigBirdAttention
from memtx.layers.encoder_attention import EncoderInputs
from memtx.models.encoder import Encoder


def attend_naively(layer: BigBirdAttention, x: Tensor, present: Tensor, table: Tensor | None) -> Tensor:
    """Attend one query at a time; table: random blocks ``(heads, blocks - 2, r)``, None for full attention."""
    batch_size, length, dim = x.shape
    width, size = dim // layer.heads, layer.block_size
    blocks = -(-length // size)
    out = torch.zeros(batch_size, length, dim, dtype=x.dtype)
    for stream in range(batch_size):
        for t in range(length):
            if table is not None and not present[stream, t]:
                continue
            for head in range(layer.heads):
                block = t // size
                if table is None or block in (0, blocks - 1):
                    seen = list(range(blocks))
                else:
                    seen = sorted({0, blocks - 1, block - 1, block, block + 1}) + table[head, block - 1].tolist()
                keys = [j for b in seen for j in range(b * size, min(b * size + size, length)) if present[stream, j]]
                channels = slice(head * width, (head + 1) * width)
                k, v = layer.key(x[stream, keys])[:, channels], layer.value(x[stream, keys])[:, channels]
                score = k @ layer.query(x[stream, t])[channels] / width**0.5
                out[stream, t, channels] = torch.softmax(score, 0) @ v
    return layer.out(out)


@given(data=st.data())
def test_every_query_sees_the_published_pattern(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch_size, size, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    length = data.draw(st.integers(size, (8 + 2 * count) * size))
    layer = BigBirdAttention(4, 2, 1, size, count, sample_in_eval=data.draw(st.booleans())).double()
    layer.train(data.draw(st.booleans()))
    x = torch.randn(batch_size, length, 4, dtype=torch.float64, requires_grad=True)
    present = torch.rand(batch_size, length) < data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    present[:, data.draw(st.integers(0, length - 1))] = True  # a text of nothing but padding has no keys
    table = None
    blocks = {}
    if length > (5 + 2 * count) * size:
        table = layer._random_block_table(EncoderInputs(-(-length // size) * size, torch.device("cpu")), None)
        table = torch.where(table == 0, 0, torch.where(table == 1, -(-length // size) - 1, table - 1))
        table = table.expand(2, -1, -1)
        if not layer.training and not layer.sample_in_eval:  # as published: the first block in place of every other
            assert (table == 0).all()
        if data.draw(st.booleans()):  # any blocks, also repeated or visible already
            blocks_per_query = data.draw(st.integers(1, 3))
            table = torch.randint(0, -(-length // size), (2, -(-length // size) - 2, blocks_per_query))
            blocks = {1: table}
    inputs = EncoderInputs.from_masks(torch.zeros(batch_size, length), present.long(), random_blocks=blocks)
    actual, expected = layer(x, inputs), attend_naively(layer, x, present, table)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)  # float64, a few dozen terms
    parameters = [x, *layer.parameters()]
    upstream = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * upstream).sum(), parameters)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-11)


def test_the_library_draws_random_blocks_in_training_only() -> None:
    folder = Path(__file__).parent / "bigbird"  # written by scripts/record_generation.py
    io = load_file(folder / "io.safetensors")
    model = memtx.from_pretrained(folder)
    assert isinstance(model, Encoder)
    for mode in ("train", "eval"):
        model.train(mode == "train")
        with torch.no_grad():
            actual = model(io["input_ids"], io["attention_mask"]).last_hidden_state
        # float32, sums in another order
        assert (actual - io[mode]).abs().max() < 1e-4, mode
    assert (io["train"] - io["eval"]).abs().max() > 1e-2


@pytest.mark.parametrize("num_random_blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("block_size", [1, 2])
def test_texts_of_few_blocks_get_full_attention(num_random_blocks: int, block_size: int) -> None:
    torch.manual_seed(0)
    layer = BigBirdAttention(4, 2, 1, block_size, num_random_blocks).double()
    for num_blocks, is_full in ((5 + 2 * num_random_blocks, True), (6 + 2 * num_random_blocks, False)):
        x = torch.randn(1, num_blocks * block_size, 4, dtype=torch.float64)
        full = attend_naively(layer, x, torch.ones(x.shape[:2], dtype=torch.bool), None)
        # One block more, and blocks of the middle miss some.
        assert torch.allclose(layer(x, EncoderInputs.from_masks(x[..., 0])), full, rtol=0, atol=1e-12) == is_full


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(2, 5, 1, dtype=torch.int64), r"\(2, 5, 1\), expected \(2, 8, any\)"),
        (torch.zeros(3, 8, 1, dtype=torch.int64), r"\(3, 8, 1\)"),
        (torch.full((2, 8, 1), 10), "do not exist.*Give integers from 0 to 9"),
        (torch.zeros(2, 8, 1), "do not exist"),
    ],
)
def test_rejects_random_blocks_that_do_not_fit(table: Tensor, message: str) -> None:
    layer = BigBirdAttention(4, 2, 0, block_size=2, num_random_blocks=1)
    x = torch.zeros(1, 20, 4)
    with pytest.raises(MemtxError, match=message):
        layer(x, EncoderInputs.from_masks(x[..., 0], random_blocks={0: table}))


def test_rejects_invalid_options() -> None:
    with pytest.raises(MemtxError, match="block_size is 0"):
        BigBirdAttention(4, 2, block_size=0)
    with pytest.raises(MemtxError, match="num_random_blocks is -1"):
        BigBirdAttention(4, 2, num_random_blocks=-1)
