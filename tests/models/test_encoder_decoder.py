"""Encoder-decoders: recorded outputs of LED, a plain transcription of the layer, and cached decoding."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.errors import MemtxError
from memtx.layers.cross_attention import CrossAttention, DecoderBlock, KeyValue
from memtx.layers.longformer import LongformerAttention
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder
from tests.hf.test_parity import folders

VOCAB = 19


def small_model() -> EncoderDecoder:
    torch.manual_seed(0)
    attention = partial(LongformerAttention, window=4)
    encoder = partial(Encoder, dim=16, depth=2, heads=2, attentions=[attention], add_mlm_head=False)
    model = EncoderDecoder(VOCAB, encoder, depth=2, heads=4, num_positions=20)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.double().eval()


def test_recorded_outputs(parity: Path) -> None:
    for folder in folders(parity, "led"):
        io, model = load_file(folder / "io.safetensors"), memtx.from_pretrained(folder)
        with torch.no_grad():
            output = model(
                io["input_ids"], io["attention_mask"], io["global_attention_mask"],
                decoder_input_ids=io["decoder_input_ids"],
            )  # fmt: skip
        # float32, sums in another order
        torch.testing.assert_close(output.logits, io["logits"], atol=1e-4, rtol=0)  # float32
        present = io["attention_mask"].bool()
        expected = io["encoder_last_hidden_state"]
        torch.testing.assert_close(
            output.encoder_last_hidden_state[present],
            expected[present],
            atol=1e-4,
            rtol=0,  # float32
        )


def plain_attention(attention: CrossAttention, x: Tensor, source: Tensor, visible: Tensor) -> Tensor:
    """Vaswani et al. 2017, section 3.2, one head and one query at a time."""
    width, out = x.shape[1] // attention.heads, torch.zeros_like(x)
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (
            projection(states)[:, part]
            for projection, states in ((attention.query, x), (attention.key, source), (attention.value, source))
        )
        for query in range(len(x)):
            scores = torch.stack([q[query] @ key / math.sqrt(width) for key in k])
            shares = scores.masked_fill(~visible[query], -torch.inf).softmax(0)
            out[query, part] = sum(share * value for share, value in zip(shares, v, strict=True))
    return attention.out(out)


def test_a_layer_is_the_plain_transcription() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(8, 2).double()
    x, source = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    actual, _ = block(x, None, block.cross_attention.project(source), mask[:, None, None])
    for row in range(2):
        hidden = x[row]
        attended = plain_attention(block.attention, hidden, hidden, torch.ones(5, 5, dtype=torch.bool).tril())
        hidden = block.attention_norm(hidden + attended)
        attended = plain_attention(block.cross_attention, hidden, source[row], mask[row].expand(5, -1))
        hidden = block.cross_attention_norm(hidden + attended)
        expected = block.feed_forward_norm(hidden + block.feed_forward(hidden))
        torch.testing.assert_close(actual[row], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rows_per_text", [1, 3])
def test_decoding_token_by_token_equals_the_whole(rows_per_text: int) -> None:
    model = small_model()
    tokens, mask = torch.randint(0, VOCAB, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    target = torch.randint(0, VOCAB, (2 * rows_per_text, 7))
    with torch.no_grad():
        state = model.start(model.encode(tokens, mask), mask)
        expected, _ = model.decode(target, state)
        for position in range(7):
            logits, state = model.decode(target[:, position : position + 1], state)
            torch.testing.assert_close(logits[:, 0], expected[:, position], atol=1e-10, rtol=0)
            # Rows of a text may be exchanged: what follows is of the chosen ones.
            order = torch.arange(len(target)).view(2, -1).flip(1).flatten()
            state, target, expected = state.select(order), target[order], expected[order]
    assert state.length == 7
    assert isinstance(state.past[0], KeyValue)


def test_padding_has_no_effect() -> None:
    model, tokens, target = small_model(), torch.randint(0, VOCAB, (1, 9)), torch.randint(0, VOCAB, (1, 5))
    mask = (torch.arange(14) < 9).long()[None]
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        expected = model(tokens, decoder_input_ids=target).logits
        actual = model(padded, mask, decoder_input_ids=target).logits
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_labels_are_shifted_and_reach_every_weight() -> None:
    model = small_model()
    labels = torch.tensor([[5, 6, 7, -100]])
    assert model.shift_labels(labels).tolist() == [[2, 5, 6, 7]]
    assert model.shift_labels(torch.tensor([[5, -100, -100]])).tolist() == [[2, 5, 0]]
    marked = torch.zeros(1, 6, dtype=torch.int64)
    marked[:, 0] = 1
    model(torch.randint(0, VOCAB, (1, 6)), None, marked, labels=labels).logits.square().sum().backward()
    unused = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # The softmax does not change if all keys are moved.
    assert all(name.endswith("key.bias") for name in unused), unused


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = memtx.from_pretrained(tmp_path)
    tokens, target = torch.randint(0, VOCAB, (1, 9)), torch.randint(0, VOCAB, (1, 5))
    assert torch.equal(loaded(tokens, decoder_input_ids=target).logits, model(tokens, decoder_input_ids=target).logits)


def test_mistakes_are_named() -> None:
    model, tokens = small_model(), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MemtxError, match="Give decoder_input_ids or labels"):
        model(tokens)
    state = model.start(model.encode(tokens))
    with pytest.raises(MemtxError, match="The target has 21 tokens, the decoder 20 positions"):
        model.decode(torch.zeros(1, 21, dtype=torch.int64), state)
    _, state = model.decode(tokens, state)
    with pytest.raises(MemtxError, match="2 tokens follow 4 others"):
        model.decode(tokens[:, :2], state)
    with pytest.raises(MemtxError, match="start_token_id is 19, but the vocabulary has 19 tokens"):
        EncoderDecoder(VOCAB, partial(Encoder, dim=16, heads=2), start_token_id=19)
