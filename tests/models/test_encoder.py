"""Encoders compared with plain float64 ones, and their errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from memtx import MemtxError
from memtx.layers.embeddings import TextEmbeddings
from memtx.layers.encoder_attention import FullAttention
from memtx.models.encoder import Encoder

TOKENS = torch.randint(1, 20, (3, 13), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 13, dtype=torch.int64)
MASK[1, 9:] = 0
MASK[2, :2] = 0


def widened(model: Encoder) -> Encoder:
    """Return the model in float64 with weights large enough that a wrong term shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def plain(model: Encoder, tokens: Tensor, seen: Tensor, types: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Return hidden states and logits by the paper's formulas; seen: ``(batch, length, length)`` bool."""
    batch_size, length = tokens.shape
    embed = model.embedding
    x = embed.word_embeddings.weight[tokens] + embed.position_embeddings.weight[:length]
    if embed.token_type_embeddings is not None:
        x = x + embed.token_type_embeddings.weight[types if types is not None else torch.zeros_like(tokens)]
    x = embed.norm(x)
    hidden = [x]
    for block in model._layers():
        attention = block.attention
        width = model.dim // attention.heads
        out = torch.empty_like(x)
        for stream in range(batch_size):
            for head in range(attention.heads):
                columns = slice(head * width, (head + 1) * width)
                q, k, v = (getattr(attention, name)(x[stream])[:, columns] for name in ("query", "key", "value"))
                score = (q @ k.T / width**0.5).masked_fill(~seen[stream], float("-inf"))
                out[stream, :, columns] = torch.softmax(score, -1) @ v
        x = block.attention_norm(x + attention.out(out))
        x = block.feed_forward_norm(x + block.feed_forward.out(block.feed_forward.activation(block.feed_forward.up(x))))
        hidden.append(x)
    head = model.head
    scored = head.norm(head.activation(head.transform(x)))
    return hidden, scored @ model.embedding.word_embeddings.weight.T + head.bias


@pytest.mark.parametrize("types", [0, 2])
def test_full_attention_ignores_padding(types: int) -> None:
    embeddings = partial(TextEmbeddings, num_positions=20, type_vocab_size=types, pad_token_id=0)
    model = widened(Encoder(20, 8, 2, 2, embeddings=embeddings))
    token_types = (TOKENS > 9).long() if types else None
    seen = (MASK > 0)[:, None, :].expand(-1, 13, -1)
    hidden, logits = plain(model, TOKENS, seen, token_types)
    out = model(TOKENS, MASK, token_types, output_hidden_states=True)
    for actual, expected in zip(out.hidden_states, hidden, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)  # float64, sums of a dozen terms
    assert torch.allclose(out.logits, logits, rtol=0, atol=1e-11)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
    assert model(TOKENS).hidden_states is None
    expected_grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    actual_grads = torch.autograd.grad(out.logits.square().sum(), list(model.parameters()))
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        assert torch.allclose(actual_grad, expected_grad, rtol=1e-9, atol=1e-9)


def test_invalid_settings_are_refused() -> None:
    embeddings = partial(TextEmbeddings, num_positions=15, pad_token_id=0)
    model = Encoder(20, 8, 1, 2, embeddings=embeddings)
    with pytest.raises(MemtxError, match=r"20 tokens needs 20 positions, the model has 15"):
        model(torch.ones(1, 20, dtype=torch.int64))
    with pytest.raises(MemtxError, match="attention_mask is"):
        model(TOKENS, MASK[:, 1:])
    with pytest.raises(MemtxError, match="the model has no token types"):
        model(TOKENS, token_type_ids=TOKENS)
    with pytest.raises(MemtxError, match="without global tokens"):
        model(TOKENS, global_attention_mask=MASK)
    with pytest.raises(MemtxError, match="layer 0, which uses none"):
        model(TOKENS, random_blocks={0: torch.zeros(2, 3, 1, dtype=torch.int64)})
    with pytest.raises(MemtxError, match="input_ids is"):
        model(TOKENS.float())
    with pytest.raises(MemtxError, match=r"dim \(9\) must be divisible by heads \(2\)"):
        Encoder(20, 9, 1, 2)
    with pytest.raises(MemtxError, match="2 attentions for 3 layers"):
        Encoder(20, 8, 3, 2, attentions=[FullAttention] * 2)
